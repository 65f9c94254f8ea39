"""Router, permutation and combine of a mixture of experts against float64 and a sort by hand, alone and as a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from nf.errors import InputError
from nf.kernels import gemm
from nf.kernels.load import KernelLoader
from nf.kernels.moe import TILE_ROWS, Moe, MoeShape, sources
from nf.kernels.registry import artifacts

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.gpu

SHARE_ERROR = 2e-5  # absolute: fp32 sums of exact products
BF16_ERROR = 2**-8  # relative, of one rounding
BLOCK_ERROR = 4e-3  # of a row's norm: activations, results of experts and the sum are rounded to bf16
NAN = float("nan")
MIXTRAL = MoeShape(4096, 8, 2)
SHAPES = [MIXTRAL, MoeShape(8192, 64, 4), MoeShape(1000, 13, 2), MoeShape(72, 3, 1), MoeShape(64, 1, 1)]


def normal(*size: int, scale: float = 1.0) -> Any:
    return (torch.randn(size, device="cuda") * scale).bfloat16()


def int32(*values: int) -> Any:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def unwritten(*size: int) -> Any:
    return torch.full(size, -7, dtype=torch.int32, device="cuda")


def stream() -> int:
    return int(torch.cuda.current_stream().cuda_stream)


@dataclass
class Tokens:
    """``capacity`` rows of which the first ``count`` are there, and the range of a nano-batch among them."""

    shape: MoeShape
    capacity: int
    count: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        self.moe = Moe(KernelLoader(artifacts(sources(), "sm_90a")), self.shape)
        self.normed = normal(self.capacity, self.shape.hidden_size)
        self.num_tokens = int32(self.count)
        self.rows = range(self.start, max(self.start, min(self.stop, self.count)))
        self.range = {"num_tokens": self.num_tokens.data_ptr(), "start": self.start, "stop": self.stop}

    @property
    def inside(self) -> Any:
        """Mask of the rows that a launch may write."""
        row = torch.arange(self.capacity, device="cuda")
        return (row >= self.rows.start) & (row < self.rows.stop)

    def route(self, weight: Any) -> tuple[Any, Any]:
        experts = unwritten(self.capacity, self.shape.experts_per_token)
        shares = torch.full(experts.shape, NAN, device="cuda")
        self.moe.route(
            normed=self.normed.data_ptr(),
            weight=weight.data_ptr(),
            experts=experts.data_ptr(),
            shares=shares.data_ptr(),
            stream=stream(),
            **self.range,
        )
        return experts, shares

    def permute(self, experts: Any, *, sms: int = 132) -> tuple[Any, Any, Any, Any]:
        """permuted, places, tile_experts, num_rows."""
        tiles = self.shape.max_tiles(self.stop - self.start)
        permuted = torch.full((tiles * TILE_ROWS, self.shape.hidden_size), NAN, device="cuda").bfloat16()
        places = unwritten(self.capacity, self.shape.experts_per_token)
        tile_experts, num_rows = unwritten(tiles), unwritten(1)
        self.moe.permute(
            normed=self.normed.data_ptr(),
            experts=experts.data_ptr(),
            permuted=permuted.data_ptr(),
            places=places.data_ptr(),
            tile_experts=tile_experts.data_ptr(),
            num_rows=num_rows.data_ptr(),
            sms=sms,
            stream=stream(),
            **self.range,
        )
        return permuted, places, tile_experts, num_rows

    def combine(self, hidden: Any, down: Any, places: Any, shares: Any, *, sms: int = 132) -> None:
        self.moe.combine(
            hidden=hidden.data_ptr(),
            down=down.data_ptr(),
            places=places.data_ptr(),
            shares=shares.data_ptr(),
            sms=sms,
            stream=stream(),
            **self.range,
        )

    def choices(self, skew: str) -> Any:
        """Different experts for each token: [capacity, k] int32, valid only inside the range."""
        experts, k = self.shape.num_experts, self.shape.experts_per_token
        liking = torch.rand(self.capacity, experts, device="cuda")
        if skew == "geometric":  # each expert is liked half as often as the one before
            liking = liking.log() * 2.0 ** torch.arange(experts, device="cuda").clamp(max=20)
        elif skew == "one":  # all tokens choose the last experts, in this order
            liking = liking * 0 + torch.arange(experts, device="cuda")
        chosen = liking.topk(k).indices.int()
        chosen[~self.inside] = 1 << 20
        return chosen.contiguous()


RANGES = [
    (1, 1, 0, 1),
    (5, 0, 0, 5),
    (300, 300, 0, 300),
    (300, 211, 37, 250),
    (300, 30, 37, 300),
    (4096, 4001, 0, 4096),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", RANGES)
def test_router(shape: MoeShape, rows: tuple[int, int, int, int]) -> None:
    tokens = Tokens(shape, *rows)
    weight = normal(shape.num_experts, shape.hidden_size, scale=shape.hidden_size**-0.5)
    experts, shares = tokens.route(weight)
    assert (experts[~tokens.inside] == -7).all()
    assert shares[~tokens.inside].isnan().all()
    experts, shares = experts[tokens.inside].long(), shares[tokens.inside].double()
    wanted = (tokens.normed[tokens.inside].double() @ weight.double().T).softmax(-1)
    best = wanted.topk(shape.experts_per_token).values
    kept = wanted.gather(1, experts)
    assert all(len(set(row)) == len(row) for row in experts.tolist())
    torch.testing.assert_close(kept, best, atol=SHARE_ERROR, rtol=0)  # another expert only where they tie in float32
    torch.testing.assert_close(shares, kept / kept.sum(-1, keepdim=True), atol=SHARE_ERROR, rtol=0)


@pytest.mark.parametrize("shape", [MIXTRAL, MoeShape(512, 40, 4)])
def test_ties_go_to_the_lower_expert(shape: MoeShape) -> None:
    tokens = Tokens(shape, 50, 50, 0, 50)
    weight = normal(1, shape.hidden_size).expand(shape.num_experts, -1).contiguous()
    experts, shares = tokens.route(weight)
    assert (experts == torch.arange(shape.experts_per_token, device="cuda")).all()
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / shape.experts_per_token))


def test_a_token_that_is_not_a_number_keeps_to_itself() -> None:
    tokens = Tokens(MIXTRAL, 20, 20, 0, 20)
    tokens.normed[7, 100] = NAN
    tokens.normed[8, 100] = float("inf")
    experts, shares = tokens.route(normal(8, 4096, scale=4096**-0.5))
    assert ((experts >= 0) & (experts < 8)).all()
    assert (experts[:, 0] != experts[:, 1]).all()
    lost = torch.zeros(20, dtype=torch.bool, device="cuda")
    lost[7:9] = True
    assert (shares.isnan().all(1) == lost).all()
    assert (shares.isnan().any(1) == lost).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", RANGES)
@pytest.mark.parametrize("skew", ["even", "geometric", "one"])
def test_permutation(shape: MoeShape, rows: tuple[int, int, int, int], skew: str) -> None:
    tokens = Tokens(shape, *rows)
    chosen = tokens.choices(skew)
    permuted, places, tile_experts, num_rows = tokens.permute(chosen, sms=132 if skew == "even" else 9)
    free, wanted_tiles = 0, []
    wanted = unwritten(*places.shape)
    for expert in range(shape.num_experts):
        at = (chosen == expert).nonzero()  # in the order of tokens
        wanted[at[:, 0], at[:, 1]] = torch.arange(free, free + len(at), device="cuda", dtype=torch.int32)
        tiles = -(-len(at) // TILE_ROWS)
        wanted_tiles += [expert] * tiles
        free += tiles * TILE_ROWS
    assert num_rows.item() == free <= len(permuted)
    assert tile_experts.tolist()[: len(wanted_tiles)] == wanted_tiles
    assert (places == wanted).all()
    rows_used = wanted[tokens.inside].long()
    for choice in range(shape.experts_per_token):
        assert (permuted[rows_used[:, choice]] == tokens.normed[tokens.inside]).all()
    assert permuted[free:].isnan().all()
    permuted[rows_used.flatten()] = 0
    assert (permuted[:free] == 0).all()  # in between


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", RANGES)
def test_combine(shape: MoeShape, rows: tuple[int, int, int, int]) -> None:
    tokens = Tokens(shape, *rows)
    k, capacity = shape.experts_per_token, tokens.capacity
    down = normal(capacity * k + 5, shape.hidden_size)
    places = torch.randperm(len(down), device="cuda")[: capacity * k].int().view(capacity, k)
    shares = torch.rand(capacity, k, device="cuda")
    hidden = normal(capacity, shape.hidden_size)
    before = hidden.clone()
    tokens.combine(hidden, down, places, shares, sms=132 if rows[0] > 300 else 2)
    assert (hidden[~tokens.inside] == before[~tokens.inside]).all()
    parts = down[places.long()].double() * shares.double()[:, :, None]
    wanted = before.double() + parts.sum(1)
    size = before.double().abs() + parts.abs().sum(1)  # sums in fp32 may cancel
    error = (hidden.double() - wanted).abs() - BF16_ERROR * wanted.abs() - 1e-6 * size
    assert (error[tokens.inside] <= 0).all()


class Block:
    """The whole feed-forward part for one range of tokens, captured as a graph."""

    def __init__(self, tokens: Tokens, inner: int, favour: float, config: gemm.GemmConfig) -> None:
        self.tokens, shape = tokens, tokens.shape
        experts, width, capacity = shape.num_experts, shape.hidden_size, tokens.capacity
        size = shape.max_rows(tokens.stop - tokens.start)
        self.router = normal(experts, width, scale=width**-0.5)
        self.router[experts - 1] += favour * self.router[0]  # likely to be chosen with the first, or not with it
        self.gate_up = normal(experts, 2 * inner, width, scale=width**-0.5)
        self.down = normal(experts, width, inner, scale=inner**-0.5)
        self.hidden = normal(capacity, width)
        self.experts = unwritten(capacity, shape.experts_per_token)
        self.shares = torch.full(self.experts.shape, NAN, device="cuda")
        self.places, self.tile_experts, self.num_rows = unwritten(*self.experts.shape), unwritten(size), unwritten(1)
        self.permuted, self.activated, self.results = (
            torch.full((size, columns), NAN, device="cuda").bfloat16() for columns in (width, inner, width)
        )
        needed = [config.source(epilogue, grouped=True) for epilogue in gemm.GROUPED_EPILOGUES]
        kernels = gemm.GemmKernels(KernelLoader(artifacts(needed, "sm_90a")))
        choice = gemm.GemmChoice(config)
        self.up_product = kernels.product(
            2 * inner, width, size, sms=132, epilogue="swiglu", num_experts=experts, choice=choice
        )
        self.down_product = kernels.product(width, inner, size, sms=132, num_experts=experts, choice=choice)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.launch()

    def launch(self) -> None:
        tokens, moe = self.tokens, self.tokens.moe
        of_choices = {"experts": self.experts.data_ptr(), "shares": self.shares.data_ptr()}
        of_tiles = {"tile_experts": self.tile_experts.data_ptr()}
        places, rows = self.places.data_ptr(), self.num_rows.data_ptr()
        how = {"stream": stream(), "pdl": True}
        moe.route(
            normed=tokens.normed.data_ptr(), weight=self.router.data_ptr(), **of_choices, **tokens.range, **how
        )  # fmt: skip
        moe.permute(
            normed=tokens.normed.data_ptr(), experts=of_choices["experts"], permuted=self.permuted.data_ptr(),
            places=places, num_rows=rows, **of_tiles, **tokens.range, sms=132, **how,
        )  # fmt: skip
        self.up_product.launch(
            x=self.permuted.data_ptr(), w=self.gate_up.data_ptr(), y=self.activated.data_ptr(),
            rows=rows, **of_tiles, stream=stream(),
        )  # fmt: skip
        self.down_product.launch(
            x=self.activated.data_ptr(), w=self.down.data_ptr(), y=self.results.data_ptr(),
            rows=rows, **of_tiles, stream=stream(),
        )  # fmt: skip
        moe.combine(
            hidden=self.hidden.data_ptr(), down=self.results.data_ptr(), places=places, shares=of_choices["shares"],
            **tokens.range, sms=132, **how,
        )  # fmt: skip

    def added(self) -> Any:
        """What the block adds to each row, float64; the choice of experts is the kernel's."""
        x = self.tokens.normed.double()
        wanted = torch.zeros_like(x)
        logits = x @ self.router.double().T
        shares = logits.gather(1, self.experts.long().clamp(min=0)).softmax(-1)
        for expert in range(self.tokens.shape.num_experts):
            token, choice = ((self.experts == expert) & self.tokens.inside[:, None]).nonzero(as_tuple=True)
            blocks = self.gate_up[expert].double().unflatten(0, (-1, 2, 8))  # 8 gate rows, 8 up rows, …
            gate, up = (x[token] @ blocks[:, half].flatten(0, 1).T for half in (0, 1))
            result = (torch.nn.functional.silu(gate) * up) @ self.down[expert].double().T
            wanted.index_add_(0, token, shares[token, choice, None] * result)
        return wanted


@pytest.mark.parametrize("shape", [MoeShape(512, 8, 2), MoeShape(272, 5, 4), MoeShape(1024, 32, 2)])
@pytest.mark.parametrize("favour", [0.0, 3.0])
@pytest.mark.parametrize("config", gemm.GROUPED, ids=lambda config: str(config.label))
def test_block(shape: MoeShape, favour: float, config: gemm.GemmConfig) -> None:
    tokens = Tokens(shape, 1500, 0, 8, 1450)
    block = Block(tokens, 720, favour, config)
    for count in (1500, 9, 0, 300):  # one graph serves them all
        tokens.normed.normal_()
        tokens.num_tokens.fill_(count)
        tokens.rows = range(8, max(8, min(count, 1450)))
        before = block.hidden.clone()
        block.graph.replay()
        torch.cuda.synchronize()
        wanted = before.double() + block.added()
        error = (block.hidden.double() - wanted).norm(dim=1) / wanted.norm(dim=1)
        assert (error[tokens.inside] < BLOCK_ERROR).all()
        assert (block.hidden[~tokens.inside] == before[~tokens.inside]).all()
        first = block.hidden.clone()
        block.hidden.copy_(before)
        block.graph.replay()
        assert (block.hidden == first).all()  # the same in every run


@pytest.mark.parametrize(
    ("field", "sizes"),
    [("hidden_size", (100, 8, 2)), ("num_experts", (64, 65, 2)), ("experts_per_token", (64, 8, 3))],
)
def test_sizes_without_a_kernel(field: str, sizes: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match=field):
        MoeShape(*sizes)
