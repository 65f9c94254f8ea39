"""Mixture of experts around its grouped GEMMs: router, permutation, weighted combine.

Shapes (T tokens of the dense batch, H hidden, E experts, k choices per token; bf16 unless said otherwise):

- normed, hidden [T, H]; router weight [E, H]
- experts [T, k] int32, shares [T, k] float32: the choices of each token, best first, and their weights (their sum is 1)
- permuted [max_rows, H]: rows of ``normed`` sorted by expert, those of an expert in the order of their tokens and from
  a multiple of 128 rows on, so that no tile of a grouped GEMM (gemm.py) straddles experts; rows in between are zero
- places [T, k] int32: row of each choice in ``permuted`` and in what is computed from it
- tile_experts [max_rows / 128] int32, num_rows [1] int32: expert of each 128 rows, and how many rows there are
- down [max_rows, H]: the experts' results

One range of tokens [start, stop), a nano-batch, takes three launches and two grouped GEMMs: ``route``; ``permute``;
permuted → activated → down; ``combine``. The number of tokens is read from device memory. Nothing depends on the order
in which CTAs run, so results are the same in every run.

The router multiplies with mma.sync straight from registers, the softmax is over all experts, and ties go to the lower
expert, as in Hugging Face's Mixtral (arXiv 2401.04088). Sorting by padded counts is that of MegaBlocks (Gale et al.,
arXiv 2211.15841).
"""

from __future__ import annotations

from dataclasses import dataclass

from nf.errors import InputError
from nf.kernels.load import KernelLoader
from nf.kernels.source import KernelSource

TILE_ROWS = 128  # of a tile of the grouped GEMM
MAX_EXPERTS = 64
EXPERTS_PER_TOKEN = (1, 2, 4)

_PERMUTE_THREADS, _COMBINE_THREADS = 512, 256
_COMBINE_UNROLL, _COMBINE_CTAS = 2, 5  # vectors per thread at a time; CTAs per multiprocessor
_CHOICES = 32  # per CTA of the permutation, at most


@dataclass(frozen=True, slots=True)
class _Router:
    """What a CTA of the router works on."""

    experts: int
    tokens: int
    warps: int
    ctas: int  # per multiprocessor

    @property
    def shared_bytes(self) -> int:
        return 4 * self.warps * self.tokens * self.experts

    def source(self) -> KernelSource:
        return KernelSource(
            name=f"moe_router_{self.experts}",
            language="cuda",
            files=("moe_router.cu", "memory.cuh", "reduce.cuh", "hopper.cuh"),
            parameters=("pointer",) * 5 + ("int32",) * 5,
            entry="moe_router",
            config=(
                ("EXPERTS", self.experts), ("TOKENS", self.tokens), ("WARPS", self.warps), ("CTAS", self.ctas),
            ),
        )  # fmt: skip


# Few experts: short tiles, so that few tokens still fill the GPU. Many: the weight is read once per 32 tokens.
_ROUTERS = (_Router(8, tokens=16, warps=16, ctas=2), _Router(MAX_EXPERTS, tokens=32, warps=8, ctas=1))


def sources() -> list[KernelSource]:
    """Routers for up to 8 and up to 64 experts, the permutation, combines of 1, 2 and 4 choices."""
    permute = KernelSource(
        name="moe_permute",
        language="cuda",
        files=("moe_permute.cu", "memory.cuh", "reduce.cuh", "hopper.cuh"),
        parameters=("pointer",) * 7 + ("int32",) * 6,
        entry="moe_permute",
        config=(("TILE_ROWS", TILE_ROWS), ("THREADS", _PERMUTE_THREADS)),
    )
    combines = [_combine_source(choices) for choices in EXPERTS_PER_TOKEN]
    return [*(router.source() for router in _ROUTERS), permute, *combines]


def _combine_source(choices: int) -> KernelSource:
    return KernelSource(
        name=f"moe_combine_{choices}",
        language="cuda",
        files=("moe_combine.cu", "memory.cuh", "hopper.cuh"),
        parameters=("pointer",) * 5 + ("int32",) * 3,
        entry="moe_combine",
        config=(
            ("TOP_K", choices),
            ("THREADS", _COMBINE_THREADS),
            ("CTAS", _COMBINE_CTAS),
            ("UNROLL", _COMBINE_UNROLL),
        ),
    )


@dataclass(frozen=True, slots=True)
class MoeShape:
    """Sizes of a mixture of experts.

    Raises:
        InputError: a size that no kernel was made for.
    """

    hidden_size: int
    num_experts: int
    experts_per_token: int

    def __post_init__(self) -> None:
        if self.hidden_size < 8 or self.hidden_size % 8:
            raise InputError("hidden_size", f"must be a multiple of 8, not {self.hidden_size}")
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise InputError("num_experts", f"must be 1 to {MAX_EXPERTS}, not {self.num_experts}")
        if self.experts_per_token not in EXPERTS_PER_TOKEN or self.experts_per_token > self.num_experts:
            raise InputError(
                "experts_per_token",
                f"must be one of {EXPERTS_PER_TOKEN} and at most num_experts ({self.num_experts}), "
                f"not {self.experts_per_token}",
            )

    def max_tiles(self, tokens: int) -> int:
        """Tiles of 128 rows that ``tokens`` can need, whatever they choose."""
        choices = tokens * self.experts_per_token
        return min(choices, (choices + self.num_experts * (TILE_ROWS - 1)) // TILE_ROWS)

    def max_rows(self, tokens: int) -> int:
        """Rows that ``permuted`` and what is computed from it need for a range of ``tokens``."""
        return TILE_ROWS * self.max_tiles(tokens)


class Moe:
    """Launches router, permutation and combine for one shape.

    All arguments but sizes are device pointers to row 0 of an array; ``num_tokens`` points to one int32, the tokens of
    the step. ``pdl`` starts a kernel before the one before has ended; it waits for that on the device.

    Args:
        loader: of ``sources()``, at least those that ``shape`` needs.
    """

    def __init__(self, loader: KernelLoader, shape: MoeShape) -> None:
        self.shape = shape
        self._router = next(router for router in _ROUTERS if shape.num_experts <= router.experts)
        self._route = loader.cuda(self._router.source().name, shared_bytes=self._router.shared_bytes)
        self._permute = loader.cuda("moe_permute")
        self._combine = loader.cuda(_combine_source(shape.experts_per_token).name)
        self._vectors = shape.hidden_size // 8

    def route(
        self,
        *,
        normed: int,
        weight: int,
        experts: int,
        shares: int,
        num_tokens: int,
        start: int,
        stop: int,
        stream: int,
        pdl: bool = False,
    ) -> None:
        """normed → experts and shares of tokens [start, stop). A token with NaN gets experts, and NaN as shares."""
        shape, router = self.shape, self._router
        self._route.launch(
            normed, weight, experts, shares, num_tokens,
            start, stop, self._vectors, shape.num_experts, shape.experts_per_token,
            grid=-(-(stop - start) // router.tokens), block=32 * router.warps, stream=stream, pdl=pdl,
        )  # fmt: skip

    def permute(
        self,
        *,
        normed: int,
        experts: int,
        permuted: int,
        places: int,
        tile_experts: int,
        num_rows: int,
        num_tokens: int,
        start: int,
        stop: int,
        sms: int,
        stream: int,
        pdl: bool = False,
    ) -> None:
        """normed, experts → permuted, places, tile_experts, num_rows of tokens [start, stop).

        Ranges may differ from those of ``route``, but must be those of ``combine``. Each range in flight has a
        ``permuted``, ``tile_experts`` and ``num_rows`` of its own.
        """
        shape, tokens = self.shape, stop - start
        # Two CTAs fit on a multiprocessor; as few as fill the GPU, because each counts all choices.
        per_cta = min(-(-tokens // (2 * sms)), _CHOICES // shape.experts_per_token)
        self._permute.launch(
            normed, experts, permuted, places, tile_experts, num_rows, num_tokens,
            start, stop, self._vectors, shape.num_experts, shape.experts_per_token, per_cta,
            grid=-(-tokens // per_cta), block=_PERMUTE_THREADS, stream=stream, pdl=pdl,
        )  # fmt: skip

    def combine(
        self,
        *,
        hidden: int,
        down: int,
        places: int,
        shares: int,
        num_tokens: int,
        start: int,
        stop: int,
        sms: int,
        stream: int,
        pdl: bool = False,
    ) -> None:
        """hidden += the experts' results, in the order of the choices, for tokens [start, stop)."""
        pieces = -(-(stop - start) * self._vectors // (_COMBINE_UNROLL * _COMBINE_THREADS))
        self._combine.launch(
            hidden, down, places, shares, num_tokens, start, stop, self._vectors,
            grid=min(pieces, _COMBINE_CTAS * sms), block=_COMBINE_THREADS, stream=stream, pdl=pdl,
        )  # fmt: skip
