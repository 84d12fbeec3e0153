"""ALiBi's slopes, RoPE's angles, the learned table's end, and the hooks' identities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.model.position import AlibiConfig, Position, Rope, RopeConfig, alibi_slopes
from tests.model.small import POSITIONS, SEQ_LEN, decoder, relative_error, tokens

LINEAR = {"kind": "linear", "factor": 4.0}
LLAMA3 = {
    "kind": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_seq_len": 256,
}


def turned(rope: Rope, q: Tensor) -> Tensor:
    """q [B, T, H, D], each turned by its place."""
    return rope.rotate(q, q, rope.turns(torch.arange(q.shape[1])[None], q.dtype))[0]


def test_alibi_slopes_equal_blooms_for_1_to_128_heads() -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for n_heads in range(1, 129):
        bloom = build_alibi_tensor(torch.ones(1, 2, dtype=torch.int64), n_heads, torch.float32)[:, 0, 1]
        ours = AlibiConfig(kind="alibi", scaled=False).build(
            d_model=1, n_heads=n_heads, head_dim=1, seq_len=1
        )
        torch.testing.assert_close(ours.slopes(torch.device("cpu")), bloom, rtol=1e-6, atol=0)


def test_falcons_slopes_are_divided_by_the_root_of_the_head_dim() -> None:
    sizes = {"d_model": 1, "n_heads": 4, "head_dim": 64, "seq_len": 1}
    plain, scaled = (AlibiConfig(kind="alibi", scaled=scaled).build(**sizes) for scaled in (False, True))
    device = torch.device("cpu")
    torch.testing.assert_close(scaled.slopes(device), plain.slopes(device) / 8, rtol=0, atol=0)


@pytest.mark.parametrize("scaling", [LINEAR, LLAMA3], ids=lambda scaling: scaling["kind"])
def test_scaled_rope_turns_by_the_angles_of_transformers(scaling: dict[str, Any]) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    names = {"kind": "rope_type", "original_seq_len": "original_max_position_embeddings"}
    theirs = {names.get(key, key): value for key, value in scaling.items()}
    llama = LlamaConfig(head_dim=64, rope_parameters={"rope_theta": 500.0, **theirs})
    config = RopeConfig.model_validate(POSITIONS["rope"] | {"theta": 500.0, "scaling": scaling})
    ours = config.build(d_model=1, n_heads=1, head_dim=64, seq_len=1)
    positions = torch.arange(3000)[None]
    turns = ours.turns(positions, torch.float32)[:, :, 0]
    cos, sin = LlamaRotaryEmbedding(llama)(torch.zeros(1), positions)
    torch.testing.assert_close(turns, torch.cat([cos[..., :32], sin[..., :32]], -1), rtol=0, atol=1e-3)


def test_the_interleaved_layout_is_the_other_one_with_its_dimensions_in_another_order() -> None:
    q = torch.randn(1, 40, 2, 8)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    interleaved = turned(Rope(8, 100.0, interleaved=True), q)
    assert torch.equal(interleaved[..., order], turned(Rope(8, 100.0), q[..., order]))


def test_alibi_slopes_of_the_paper() -> None:
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]


def test_a_cast_to_bf16_leaves_slopes_and_angles_in_fp32() -> None:
    alibi, rope = decoder(position=POSITIONS["alibi"]).bfloat16(), Rope(8, 10_000.0).bfloat16()
    assert alibi.position.slopes(torch.device("cpu")).dtype == torch.float32
    q = torch.randn(1, 2048, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = turned(Rope(8, 10_000.0), q.double())
    cast = turned(rope, q)
    assert cast.dtype == torch.bfloat16
    assert relative_error(cast, exact) < 2**-8  # one rounding to bf16; bf16 angles would be off by radians


def test_rope_turns_the_same_whatever_length_was_seen_before() -> None:
    q = torch.randn(1, 40, 1, 8)
    grown = Rope(8, 100.0)
    turned(grown, q[:, :3])
    assert torch.equal(turned(grown, q), turned(Rope(8, 100.0), q))


def test_tables_made_in_inference_mode_serve_training() -> None:
    for kind in ("rope", "alibi"):
        model = decoder(position=POSITIONS[kind], attention={"backend": "sdpa"})
        with torch.inference_mode():
            model(tokens())
        model(tokens(), labels=tokens()).total.backward()


def test_the_learned_table_ends_at_seq_len() -> None:
    model = decoder(position={"kind": "learned"})
    with pytest.raises(ValueError, match=f"seq_len={SEQ_LEN}"):
        model(tokens(length=SEQ_LEN + 1))


def test_relative_positions_go_beyond_seq_len() -> None:
    for kind in ("rope", "alibi", "none"):
        assert decoder(position=POSITIONS[kind])(tokens(length=2 * SEQ_LEN)).isfinite().all()


def test_hooks_are_identities_by_default() -> None:
    part, x = Position(), torch.randn(1, 2, 3, 4)
    q, k = part.rotate(x, x + 1, torch.arange(3)[None])
    assert torch.equal(q, x)
    assert torch.equal(k, x + 1)
    assert torch.equal(part.embed(x, torch.arange(3)[None]), x)
    assert part.slopes(torch.device("cpu")) is None
