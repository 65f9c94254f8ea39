"""The kernels that a model needs, in the configurations that fit its shape."""

from __future__ import annotations

from collections.abc import Sequence

from nf.executors.gpu_buffers import Sizes, decode_shape, moe_shape
from nf.kernels.compile import Artifact
from nf.kernels.copies import PageCopy, RowForks
from nf.kernels.decode_attention import DecodeAttention
from nf.kernels.gather import Embed
from nf.kernels.gemm import GemmKernels
from nf.kernels.moe import Moe
from nf.kernels.norm import RmsNorm
from nf.kernels.prefill_attention import PrefillAttention
from nf.kernels.rope_append import KvRows, RopeAppend, RopeShape
from nf.kernels.sampling import PromptLogprobs, Sampler
from nf.models.declaration import Model


class LayerKernels:
    """The kernels of one model, loaded once and shared by all graphs."""

    def __init__(self, artifacts: Sequence[Artifact], model: Model, sizes: Sizes, *, page_bytes: int, sms: int) -> None:
        config = model.config
        heads = (config.num_heads, config.num_kv_heads, config.head_dim, sizes.page_size)
        rope = RopeShape(*heads, qk_norm=config.qk_norm, eps=config.rms_norm_eps)
        self.gemm = GemmKernels(artifacts)
        self.norm = RmsNorm(artifacts, config.hidden_size, config.rms_norm_eps)
        self.gather_norm = RmsNorm(artifacts, config.hidden_size, config.rms_norm_eps, "gather")
        self.embed = Embed(artifacts, config.hidden_size, sizes.tokens_stride)
        self.forks = RowForks(artifacts, sizes.tokens_stride)
        self.kv_rows = KvRows(artifacts, sizes.page_size)
        self.rope_append = RopeAppend(artifacts, rope)
        self.decode_attention = DecodeAttention(artifacts, decode_shape(config, sizes.page_size), sms=sms)
        self.prefill_attention = PrefillAttention(
            artifacts,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            page_size=sizes.page_size,
            window=config.sliding_window,
        )
        self.moe = Moe(artifacts, moe_shape(config)) if config.num_experts else None
        self.sampler = Sampler(
            artifacts, "fp32", vocab_size=config.vocab_size, tokens_stride=sizes.tokens_stride, sms=sms
        )
        self.prompt_logprobs = PromptLogprobs(artifacts, "fp32", vocab_size=config.vocab_size)
        self.page_copy = PageCopy(artifacts, layers=config.num_layers, page_bytes=page_bytes)
