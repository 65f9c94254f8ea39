"""The kernels that a model needs, in the configurations that fit its shape."""

from __future__ import annotations

from nf.executors.gpu_buffers import Sizes, decode_shape, moe_shape
from nf.kernels.copies import PageCopy, RowForks
from nf.kernels.decode_attention import DecodeAttention
from nf.kernels.gather import Embed
from nf.kernels.gemm import GemmKernels
from nf.kernels.load import KernelLoader
from nf.kernels.moe import Moe
from nf.kernels.norm import RmsNorm
from nf.kernels.prefill_attention import PrefillAttention
from nf.kernels.rope_append import KvRows, RopeAppend, RopeShape
from nf.kernels.sampling import PromptLogprobs, Sampler
from nf.models.declaration import Model


class LayerKernels:
    """The kernels of one model, loaded once and shared by all graphs; who made the loader unloads them."""

    def __init__(self, loader: KernelLoader, model: Model, sizes: Sizes, *, page_bytes: int, sms: int) -> None:
        config = model.config
        heads = (config.num_heads, config.num_kv_heads, config.head_dim, sizes.page_size)
        rope = RopeShape(*heads, qk_norm=config.qk_norm, eps=config.rms_norm_eps)
        self.gemm = GemmKernels(loader)
        self.norm = RmsNorm(loader, config.hidden_size, config.rms_norm_eps)
        self.gather_norm = RmsNorm(loader, config.hidden_size, config.rms_norm_eps, "gather")
        self.embed = Embed(loader, config.hidden_size, sizes.tokens_stride)
        self.forks = RowForks(loader, sizes.tokens_stride)
        self.kv_rows = KvRows(loader, sizes.page_size)
        self.rope_append = RopeAppend(loader, rope)
        self.decode_attention = DecodeAttention(loader, decode_shape(config, sizes.page_size), sms=sms)
        self.prefill_attention = PrefillAttention(
            loader,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            page_size=sizes.page_size,
            window=config.sliding_window,
        )
        self.moe = Moe(loader, moe_shape(config)) if config.num_experts else None
        self.sampler = Sampler(loader, "fp32", vocab_size=config.vocab_size, tokens_stride=sizes.tokens_stride, sms=sms)
        self.prompt_logprobs = PromptLogprobs(loader, "fp32", vocab_size=config.vocab_size)
        self.page_copy = PageCopy(loader, layers=config.num_layers, page_bytes=page_bytes)
