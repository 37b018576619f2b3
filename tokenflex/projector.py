"""The token-adaptive projector: any patch grid in, any number of vision tokens out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.checkpoint import checkpoint

from tokenflex.counts import Grid, ImageTokenCounts, TokenCount, is_one_count, token_grid
from tokenflex.counts import token_grids as grids_of_counts
from tokenflex.positions import NUM_FEATURES, cell_positions, check_position
from tokenflex_kernels import PackPlan, pack_embeddings, project_and_pack
from tokenflex_kernels.checks import (
    check_count,
    check_eps,
    check_float,
    check_grids,
    check_tensor,
)
from tokenflex_kernels.pool_norm.axis_weights import check_mode
from tokenflex_kernels.pool_norm.op import pool_norm
from tokenflex_kernels.pool_norm.plan import PoolPlan, plan_pooling, plan_uniform
from tokenflex_kernels.project_tokens.captured import CapturedProjection
from tokenflex_kernels.project_tokens.op import check_save, project_tokens
from tokenflex_kernels.swiglu.reference import activation


class TokenAdaptiveProjector(nn.Module):
    """Pool, normalise and project patch features to a chosen number of vision tokens.

    Adaptive average pooling + LayerNorm + SwiGLU, as in TokenFLEX (arXiv 2504.03154). Its
    parameters do not depend on the count, so one projector serves every budget and a batch may mix
    counts. The four submodules are a plain LayerNorm and three plain Linears with bias; a position
    is one Linear more.

    Args:
        vision_width: C, width of the patch features.
        text_width: D, width of the language model.
        hidden_width: H of the SwiGLU; 3 * vision_width if None, as in the paper.
        num_tokens: the default count of ``forward``.
        pooling: "adaptive" (the paper) or "resize" (the released model).
        eps: of the LayerNorm.
        save: "preactivation" or "input", which training keeps for backward, see
            :func:`tokenflex_kernels.project_tokens`.
        position: None (the paper), or "normalized" to add a learned linear map of the position of
            each token's cell in its image (:func:`tokenflex.positions.cell_positions`), which also
            holds for grids that were never trained. It begins at zero.

    Raises:
        TypeError, ValueError: an argument is of a wrong type or out of its range.

    Example:
        >>> projector = TokenAdaptiveProjector(vision_width=1152, text_width=2048)
        >>> patches = torch.randn(2, 27 * 27, 1152)
        >>> projector(patches, 64).shape
        torch.Size([2, 64, 2048])
        >>> projector(patches, [64, 256]).shape  # mixed counts: flat, 64 + 256 rows
        torch.Size([320, 2048])
    """

    _graphs: CapturedProjection | None = None

    def __init__(
        self,
        vision_width: int,
        text_width: int,
        *,
        hidden_width: int | None = None,
        num_tokens: TokenCount = 256,
        pooling: str = "adaptive",
        eps: float = 1e-5,
        save: str = "preactivation",
        position: str | None = None,
    ) -> None:
        super().__init__()
        self.vision_width = check_count("vision_width", vision_width)
        self.text_width = check_count("text_width", text_width)
        hidden_width = 3 * vision_width if hidden_width is None else hidden_width
        self.hidden_width = check_count("hidden_width", hidden_width)
        grid = token_grid(num_tokens)
        # JSON has lists in place of pairs, but a list of counts has one per image.
        self.num_tokens: TokenCount = grid if isinstance(num_tokens, Sequence) else num_tokens
        self.pooling = check_mode(pooling, name="pooling")
        self.save = check_save(save)
        self.layernorm = nn.LayerNorm(vision_width, eps=check_eps(eps))
        self.gate = nn.Linear(vision_width, self.hidden_width)
        self.up = nn.Linear(vision_width, self.hidden_width)
        self.down = nn.Linear(self.hidden_width, text_width)
        self.position: nn.Linear | None = None
        if check_position(position):
            self.position = nn.Linear(NUM_FEATURES, text_width, bias=False)
            nn.init.zeros_(self.position.weight)

    def reset_parameters(self) -> None:
        """Initialise the weights as PyTorch does, and the position with zeros."""
        for module in (self.layernorm, self.gate, self.up, self.down):
            module.reset_parameters()
        if self.position is not None:
            nn.init.zeros_(self.position.weight)

    def capture_graphs(self, max_graphs: int = 16) -> None:
        """Project by CUDA graphs from now on, where no gradient is recorded.

        For inference on one or a few images on a GPU, where launching the kernels one by one takes
        longer than they run. The first call with other grids, counts or weights captures a graph;
        see :class:`tokenflex_kernels.CapturedProjection`. Other calls run as before.

        Args:
            max_graphs: that are kept, at least 1.
        """
        self._graphs = CapturedProjection(max_graphs)

    def forward(
        self,
        features: torch.Tensor,
        num_tokens: ImageTokenCounts | None = None,
        grids: Grid | Sequence[Grid] | None = None,
        *,
        plan: PoolPlan | None = None,
    ) -> torch.Tensor:
        """Return the vision tokens of every image.

        Args:
            features: float [B, L, C], L patches per image; or flat [sum of L, C] with ``grids``.
            num_tokens: an int (a perfect square) or an (h, w) tuple for all images, or a list
                with one of those per image; the projector's own ``num_tokens`` if None.
            grids: the images' patch grids: an (H, W) tuple for all images of a batch, or one per
                image; None for a batch of square grids.
            plan: a plan of both, for example of a data loader, in place of ``num_tokens`` and
                ``grids`` (:func:`tokenflex_kernels.plan_pooling`). A compiled projector then takes
                any number of images.

        Returns:
            [B, N, D] for one count; flat [sum of N, D] for a sequence of counts or a plan.

        Raises:
            TypeError: ``features`` is not a float tensor, or a count or grid has other than ints.
            ValueError: counts, grids and features do not fit together.
        """
        check_tensor("features", features)
        check_float("features", features)
        if features.ndim not in (2, 3):
            raise ValueError(
                "features must be [B, L, C] or flat [sum of L, C], got shape "
                f"{tuple(features.shape)}"
            )
        if features.shape[-1] != self.vision_width:
            raise ValueError(
                f"features must have width vision_width={self.vision_width}, got "
                f"{features.shape[-1]}"
            )
        rows = features.reshape(-1, self.vision_width)
        if plan is not None:
            if num_tokens is not None or grids is not None:
                raise ValueError("plan holds grids and counts: got num_tokens or grids beside it")
            return self._project(rows, plan)
        num_images, in_grids = _patch_grids(features, grids)
        counts = self.num_tokens if num_tokens is None else num_tokens
        if not is_one_count(counts):
            per_image = [in_grids] * num_images if isinstance(in_grids, tuple) else in_grids
            return self._project(rows, plan_pooling(per_image, grids_of_counts(counts, num_images)))
        out_grid = token_grid(counts)
        if isinstance(in_grids, tuple):
            plan = plan_uniform(num_images, in_grids, out_grid)
        else:
            plan = plan_pooling(in_grids, [out_grid] * num_images)
        tokens = self._project(rows, plan)
        return tokens.view(num_images, out_grid[0] * out_grid[1], self.text_width)

    def pack(
        self, features: torch.Tensor, plan: PoolPlan, embedding: torch.Tensor, packing: PackPlan
    ) -> torch.Tensor:
        """Return the vision tokens and a batch's text in one packed buffer.

        The same as packing the tokens of :meth:`forward`. Where nothing adds to what ``forward``
        computes, they are written into the buffer as they are computed.

        Args:
            features: float [sum of L, C].
            plan: the images' patch grids and grids of tokens.
            embedding: float [V, D], the embedding table of the text. The tokens are moved to its
                device and dtype.
            packing: the batch's plan, on the device of ``embedding``.

        Returns:
            [total, D] in the dtype of ``embedding``.
        """
        is_alike = features.device == embedding.device and features.dtype == embedding.dtype
        if is_alike and self._is_called_plainly() and self._is_plain():
            options = self._fused_options()
            return project_and_pack(features, plan, embedding=embedding, plan=packing, **options)
        tokens = self(features, plan=plan).to(embedding.device, embedding.dtype)
        return pack_embeddings(embedding, tokens, packing)

    def _is_called_plainly(self) -> bool:
        """Return True if a call computes what the submodules do, and nobody else sees it."""
        return (
            type(self) is TokenAdaptiveProjector
            and self.position is None
            and self._compiled_call_impl is None
            and not is_hooked(self)
            and not _has_any_global_hook()
        )

    def _project(self, rows: torch.Tensor, plan: PoolPlan) -> torch.Tensor:
        tokens = self._project_pooled(rows, plan)
        if self.position is None:
            return tokens
        weight = self.position.weight
        dtype = (
            weight.dtype if weight.is_floating_point() else tokens.dtype
        )  # quantised weights are ints
        offsets = self.position(cell_positions(plan, dtype, tokens.device))
        return tokens + offsets.to(tokens.dtype)

    def _project_pooled(self, rows: torch.Tensor, plan: PoolPlan) -> torch.Tensor:
        if not self._is_plain():
            return self._project_by_modules(rows, plan)
        graphs = self._graphs
        project = project_tokens if graphs is None or not graphs.takes(rows) else graphs
        return project(rows, plan, **self._fused_options())

    def _fused_options(self) -> dict[str, Any]:
        """Return the arguments of the fused ops that are the projector's."""
        return {
            "norm_weight": self.layernorm.weight,
            "norm_bias": self.layernorm.bias,
            "gate_weight": self.gate.weight,
            "gate_bias": self.gate.bias,
            "up_weight": self.up.weight,
            "up_bias": self.up.bias,
            "down_weight": self.down.weight,
            "down_bias": self.down.bias,
            "mode": self.pooling,
            "eps": self.layernorm.eps,
            "save": self.save,
        }

    def _is_plain(self) -> bool:
        """Return True if the submodules are plain layers, as the fused op assumes.

        Adapters (LoRA), quantised layers, sharded layers and hooks replace or extend them.
        """
        linears = (self.gate, self.up, self.down)
        return (
            type(self.layernorm) is nn.LayerNorm
            and all(type(linear) is nn.Linear for linear in linears)
            and not any(is_traceable_wrapper_subclass(linear.weight) for linear in linears)
            and not any(map(is_hooked, (self.layernorm, *linears)))
        )

    def _project_by_modules(self, rows: torch.Tensor, plan: PoolPlan) -> torch.Tensor:
        """Compute the same through the forward of the submodules."""
        pooled = pool_norm(rows, plan, mode=self.pooling)
        if self.save == "input":
            return checkpoint(self._feed_forward, pooled, use_reentrant=False)
        return self._feed_forward(pooled)

    def _feed_forward(self, pooled: torch.Tensor) -> torch.Tensor:
        tokens = self.layernorm(pooled)
        return self.down(activation(self.gate(tokens)) * self.up(tokens))

    def extra_repr(self) -> str:
        return f"num_tokens={self.num_tokens}, pooling={self.pooling!r}, save={self.save!r}"


def is_hooked(module: nn.Module) -> bool:
    """Return True if calling ``module`` does more than its class's forward."""
    return bool(
        "forward" in vars(module)  # replaced on the instance, as accelerate does
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _patch_grids(
    features: torch.Tensor, grids: Grid | Sequence[Grid] | None
) -> tuple[int, Grid | list[Grid]]:
    """Return the number of images, and their patch grid or a list with one for each."""
    batched, patches = features.ndim == 3, features.shape[-2]  # of an image, or of all
    if grids is None:
        if not batched:
            raise ValueError(
                f"grids must name each image's (H, W) when features are flat, got None for "
                f"features of shape {tuple(features.shape)}"
            )
        try:
            return features.shape[0], token_grid(patches, name="grids")
        except ValueError:
            raise ValueError(
                f"grids must be given when an image's {patches} patches are no square grid"
            ) from None
    if is_one_count(grids):
        grid = token_grid(grids, name="grids")
        size = grid[0] * grid[1]
        if batched and patches != size:
            raise ValueError(
                f"grids = {grid} holds {size} patches, but features have {patches} per image"
            )
        if not batched and patches % size:
            raise ValueError(
                f"grids={grid} holds {size} patches an image, but the {patches} rows of features "
                "are no multiple of that"
            )
        return features.shape[0] if batched else patches // size, grid
    per_image = check_grids("grids", grids)
    sizes = [height * width for height, width in per_image]
    if not batched and patches != sum(sizes):
        raise ValueError(
            f"grids of {len(per_image)} images hold {sum(sizes)} patches, but features have "
            f"{patches} rows"
        )
    if batched and len(per_image) != len(features):
        raise ValueError(
            f"grids must have one entry per image: got {len(per_image)} for {len(features)} images"
        )
    for i, size in enumerate(sizes if batched else ()):
        if size != patches:
            raise ValueError(
                f"grids[{i}] = {per_image[i]} holds {size} patches, but features have {patches} "
                "per image"
            )
    return len(per_image), per_image
