"""Numbers that the papers and DeepSpeed print, from the formulas under their names."""

from __future__ import annotations

import itertools

import pytest

from posttrain.memory.published import (
    KorthikantiLayer,
    deepspeed_zero2,
    deepspeed_zero2_docs,
    deepspeed_zero3,
    kv_cache_bytes_per_token,
    ring_bytes,
    zero_activation_elements,
    zero_checkpoint_bytes,
    zero_communication,
    zero_max_params,
    zero_offload,
)

GB, GIB = 1e9, 2**30


def test_zero_table_2_by_inversion():
    """32 GB, 64 devices: 2, 7.6, 14.4 and 128 billion parameters; model parallelism m multiplies
    all."""
    ours = [zero_max_params(32e9, zero_stage=s, num_devices=64) / 1e9 for s in range(4)]
    assert ours == pytest.approx([2, 7.642, 14.42, 128], rel=1e-3)
    printed = {1: (2, 7.6, 14.4, 128), 2: (4, 15.3, 28.8, 256), 4: (8, 30.6, 57.7, 512)}
    for m, row in printed.items():
        for ours_1, theirs in zip(ours, row, strict=True):
            assert m * ours_1 == pytest.approx(theirs, abs=0.06)


def test_zero_communication():
    assert [zero_communication(7, zero_stage=s) for s in range(4)] == [14, 14, 14, 21]
    assert [zero_communication(7, zero_stage=s, accumulation=4) for s in range(4)] == [
        14,
        14,
        35,
        84,
    ]
    seven = 7 * 10**9
    assert (
        2 * zero_communication(seven, zero_stage=2) == 28e9
        and 2 * zero_communication(seven, zero_stage=3) == 42e9
    )
    ring = [
        ring_bytes(zero_communication(seven, zero_stage=s), num_devices=8, bytes_each=2) / GB
        for s in (2, 3)
    ]
    assert ring == [24.5, 36.75]
    with pytest.raises(ValueError, match="0 to 3"):
        zero_communication(7, zero_stage=4)


def test_zero_activations():
    """GPT-2 1.5B at batch 32: the paper says about 60 GB; one checkpoint per layer of its 100B
    model is 67.1 GB."""
    gpt2 = {"hidden": 1600, "batch": 32, "seq": 1024, "layers": 48}
    assert 2 * zero_activation_elements(**gpt2) / GB == pytest.approx(60.4, abs=0.05)
    assert zero_checkpoint_bytes(**gpt2) / GB == pytest.approx(5.03, abs=0.005)
    big = {"hidden": 8192, "batch": 32, "seq": 1024, "layers": 125}
    assert zero_checkpoint_bytes(**big) / GB == pytest.approx(67.1, abs=0.05)
    assert zero_checkpoint_bytes(**big, model_parallel=16) / GB == pytest.approx(4.19, abs=0.005)


def test_korthikanti():
    gpt3 = KorthikantiLayer(seq=2048, batch=1, hidden=12288, heads=96)
    mt_nlg = KorthikantiLayer(seq=2048, batch=1, hidden=20480, heads=128)
    assert (gpt3.score_term, mt_nlg.score_term) == (80, 64)
    assert gpt3.saved_by_selective == pytest.approx(
        0.70, abs=0.005
    ) and mt_nlg.saved_by_selective == pytest.approx(0.65, abs=0.005)
    assert gpt3.selective_extra_flops == pytest.approx(0.0278, abs=1e-4)
    sbh = 2048 * 12288
    rows = {
        (1, False, "none"): 114,
        (8, False, "none"): 10 + 3 + 10,
        (8, True, "none"): 34 / 8 + 10,
        (8, False, "selective"): 13,
        (8, True, "selective"): 34 / 8,
        (1, False, "full"): 2,
    }
    for (t, sp, recompute), wanted in rows.items():
        assert gpt3.bytes_per_layer(
            tensor_parallel=t, sequence_parallel=sp, recompute=recompute
        ) == pytest.approx(sbh * wanted)
    seven = KorthikantiLayer(seq=2048, batch=1, hidden=4096, heads=32)
    assert 32 * seven.bytes_per_layer() / GB == pytest.approx(30.60, abs=0.005)
    assert 32 * seven.bytes_per_layer(recompute="selective") / GB == pytest.approx(9.13, abs=0.005)
    assert 32 * seven.bytes_per_layer(recompute="full") / GB == pytest.approx(0.54, abs=0.005)


def test_zero_offload_and_kv_cache():
    assert zero_offload(13 * 10**9) == {"device": 26e9, "host": 182e9, "transfer": 52e9}
    assert kv_cache_bytes_per_token(layers=32, kv_heads=32, head_dim=128) == 2**19


def test_deepspeed_docs_and_source_disagree():
    """t5-3b (2851e6 parameters, largest layer 32e6) on 8 GPUs: what the documentation's tables
    print, in GiB."""
    params, layer = 2_851_000_000, 32_000_000
    assert deepspeed_zero2_docs(params, num_devices=8) / GIB == pytest.approx(15.93, abs=0.005)
    cpu, gpu = deepspeed_zero2(params, gpus_per_node=8)
    assert (gpu / GIB, cpu / GIB) == pytest.approx((5.31, 127.45), abs=0.01)
    assert deepspeed_zero2(params, gpus_per_node=8, offload=False)[1] / GIB == pytest.approx(
        11.28, abs=0.01
    )
    rows = [
        deepspeed_zero3(
            params, largest_layer=layer, gpus_per_node=8, offload_optimizer=o, offload_params=p
        )
        for o, p in ((False, False), (True, False), (True, True))
    ]
    assert [g / GIB for _, g in rows] == pytest.approx([6.09, 0.78, 0.12], abs=0.01)
    assert [c / GIB for c, _ in rows] == pytest.approx([1.43, 63.72, 71.69], abs=0.02)


def test_deepspeed_estimators_equal_the_installed_ones():
    stage_2 = pytest.importorskip("deepspeed.runtime.zero.stage_1_and_2")
    stage_3 = pytest.importorskip("deepspeed.runtime.zero.stage3")
    for gpus, nodes, offload in itertools.product((1, 8), (1, 4), (False, True)):
        theirs = stage_2.estimate_zero2_model_states_mem_needs(
            10**9 + 7, gpus, nodes, cpu_offload=offload
        )
        assert (
            deepspeed_zero2(10**9 + 7, gpus_per_node=gpus, nodes=nodes, offload=offload) == theirs
        )
        for params, init in itertools.product((False, True), (False, True)):
            theirs = stage_3.estimate_zero3_model_states_mem_needs(
                10**9 + 7, 10**7, gpus, nodes, offload, params, init
            )
            ours = deepspeed_zero3(
                10**9 + 7,
                largest_layer=10**7,
                gpus_per_node=gpus,
                nodes=nodes,
                offload_optimizer=offload,
                offload_params=params,
                zero_init=init,
            )
            assert ours == theirs[:2]
