"""The prediction of scaling: its reader on a program written by hand, its promises, and the command on a small network."""

import dataclasses
import json
from contextlib import nullcontext
from unittest import mock

import pytest
import scaling
from hlo import Collective, Reading, read

from tests.models import tiny
from tinyonn_jax.config import Config, LearningConfig, MeshConfig, OptimConfig
from tinyonn_jax.models import transformer
from tinyonn_jax.presets import PRESETS

# A loop of 3 turns, in it one of 5 and one of unknown length. Not a program that would run.
PROGRAM = """\
HloModule jit_step, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (p: f16[4,6]) -> f16[4,6] {
  %p = f16[4,6]{1,0} parameter(0)
  %q = f16[6,5]{0,1} parameter(1)
  %product = f16[4,5]{1,0} dot(%p, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %whole = f16[4,6]{1,0} all-gather(%p), channel_id=1, replica_groups=[4,2]<=[2,2,2]T(0,2,1), dimensions={1}
}

%endless (p: f32[2,3]) -> f32[2,3] {
  %p = f32[2,3]{1,0} parameter(0)
  ROOT %square = f32[2,2]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%maybe (p: f32[2,3]) -> f32[2,3] {
  %p = f32[2,3]{1,0} parameter(0)
  ROOT %square = f32[2,2]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%body (p: f32[10]) -> f32[10] {
  %p = f32[10]{0} parameter(0)
  %w.1 = f16[4,6]{1,0} while(%p), condition=%add, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  %w.2 = f32[2,3]{1,0} while(%p), condition=%add, body=%endless
  %alone = f32[10]{0} all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  %both = (f32[10]{0}, /*index=1*/bf16[2,2]{1,0}) all-reduce(%p, %p), replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  ROOT %part = f32[10]{0} reduce-scatter(%p), replica_groups=mesh['a'=2,'b'=4], device_ids=([2,4]T(1,0)) {'b'}, dimensions={0}
}

ENTRY %main (p: f32[10]) -> f32[10] {
  %p = f32[10]{0} parameter(0)
  %same = f32[10]{0} collective-permute(%p), source_target_pairs={{0,0},{1,1}}
  %swap = f32[10]{0} collective-permute(%p), source_target_pairs={{0,0},{1,2},{2,1}}
  %all = f32[] all-reduce(%p), replica_groups={}, to_apply=%add
  %either = f32[2,3]{1,0} conditional(%p, %p, %p), branch_computations={%endless, %maybe}
  ROOT %w = f32[10]{0} while(%p), condition=%add, body=%body, backend_config={"known_trip_count":{"n":"3"}}
}
"""


def test_a_program_by_hand():
    got = read(PROGRAM, 8)
    gather, reduce, scatter, swap, everywhere = got.collectives
    assert (gather.kind, gather.shapes, gather.axis, gather.times) == ("all-gather", ((4, 6),), 1, 15)
    assert gather.groups == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert gather.payload == 15 * 48 and gather.sent == 15 * 48 / 2
    assert (reduce.shapes, reduce.times, reduce.payload) == (((10,), (2, 2)), 3, 3 * (40 + 8))
    assert reduce.sent == 2 * 144 / 2
    # devices (0 4) (1 5) (2 6) (3 7) over 'b' of a 2 × 4 mesh, laid out as [[0 4 1 5] [2 6 3 7]]
    assert scatter.groups == ((0, 4, 1, 5), (2, 6, 3, 7))
    assert scatter.payload == 3 * 40 * 4 and scatter.sent == 480 * 3 / 4
    assert (swap.groups, swap.payload, swap.sent) == (((1, 2), (2, 1)), 40, 40)
    assert (everywhere.groups, everywhere.sent) == ((tuple(range(8)),), 2 * 4 * 7 / 8)
    assert (got.flops, got.unknown, got.loops) == (15 * 2 * 4 * 5 * 6, 0, 2)
    assert got.payload(("all-gather", "reduce-scatter")) == 720 + 480


def test_collectives_in_loops_of_unknown_length_are_noticed():
    text = PROGRAM.replace(', backend_config={"known_trip_count":{"n":"5"}}', "")
    got = read(text, 8)
    assert (got.unknown, got.flops, got.loops) == (1, 0, 3)


def test_groups_that_are_not_understood_stop_it():
    with pytest.raises(ValueError, match="not understood"):
        read(PROGRAM.replace("replica_groups={}", "replica_groups=new(8)"), 8)


MODEL = tiny.config(dim=16, latent_heads=16, experts=24, expert_hidden=10)
CONFIG = Config(model=MODEL, optim=OptimConfig(matrices="adamw"))
ROWS, LENGTH = 4, 9


@pytest.mark.parametrize(
    ("shape", "axis", "over", "words"),
    [
        ((2 * ROWS * LENGTH, 16), 0, "expert", "tokens"),
        ((2 * ROWS, LENGTH, 16), 0, "fsdp", "tokens"),
        ((24, 16, 20), 0, "expert", "all modules"),
        ((24, 8, 20), 0, "expert", "all modules"),  # each still cut over fsdp
        ((384, 20), 0, "expert", "all modules"),
        ((24, 10, 16), 2, "expert", "all modules"),
        ((12, 16, 20), 1, "fsdp", ""),  # a device's own
        ((ROWS * LENGTH, 24), 1, "expert", ""),
    ],
)
def test_what_must_not_be_gathered(shape, axis, over, words):
    groups = {"expert": ((0, 1), (2, 3)), "fsdp": ((0, 2), (1, 3))}[over]
    gather = Collective("all-gather", (shape,), 4, groups, axis, 1)
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(2, 2, 2))
    found = scaling.forbidden(Reading((gather,), 0, 0, 0), transformer.spec(MODEL, 3), config, ROWS, LENGTH)
    assert words in found and bool(words) == bool(found)


@pytest.mark.parametrize(("shape", "words"), [((768, 768), ""), ((24, 768, 64), "all modules"), ((16, 768, 1536), "all modules")])
def test_keys_of_arc1_are_as_large_as_half_of_its_latent_heads_and_may_be_gathered(shape, words):
    config = dataclasses.replace(PRESETS["arc1"][1], mesh=MeshConfig(2, 2, 2))
    gather = Collective("all-gather", (shape,), 4, ((0, 1), (2, 3)), 0, 1)
    found = scaling.forbidden(Reading((gather,), 0, 0, 0), transformer.spec(config.model, 3), config, ROWS, LENGTH)
    assert words in found and bool(words) == bool(found)


def row(mesh: MeshConfig, payload: int, group: tuple[int, ...] = (0, 1)) -> scaling.Figures:
    reading = Reading((Collective("all-reduce", ((payload,),), payload, (group,), None, 1),), 0, 0, 0)
    return scaling.Figures(mesh, 1.0, 2e12, 1.0, 1, 1, reading)


def test_growing_bytes_are_noticed():
    few, many = MeshConfig(2, 2, 2), MeshConfig(4, 2, 2)
    assert scaling.flat([row(MeshConfig(1), 0), row(few, 1000), row(many, 1010)]) == ""
    assert "from 1,000 on 8 devices to 1,100 on 16" in scaling.flat([row(few, 1000), row(many, 1100)])


def test_a_collective_beyond_an_island_takes_the_slow_link():
    machine = scaling.Machine("m", peak=1e13, island=8, near=100.0, far=10.0)
    assert scaling.predict(machine, row(MeshConfig(2, 2, 2), 300, (0, 4, 7))) == pytest.approx((0.5, 300 * 2 * 2 / 3 / 100))
    assert scaling.predict(machine, row(MeshConfig(4, 2, 2), 300, (0, 4, 8)))[1] == pytest.approx(300 * 2 * 2 / 3 / 10)


def test_the_command_on_a_small_network(monkeypatch, tmp_path, capsys):
    measure, config = scaling.measure, dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, depth=1))
    monkeypatch.setitem(scaling.PRESETS, "arc1", ("", dataclasses.replace(config, learning=LearningConfig(rule="none"))))
    monkeypatch.setattr(scaling, "measure", lambda config, mesh: measure(config, mesh, ROWS, LENGTH))
    monkeypatch.setenv("XLA_FLAGS", "")
    scaling.main(["--devices", "8", "--json", str(tmp_path / "rows.json")])
    out = capsys.readouterr().out
    assert "2 × 2 × 2" in out and "not measured" in out and "–" in out.split("efficiency")[1].split("Predicted")[0]
    (found,) = json.loads((tmp_path / "rows.json").read_text())
    assert found["devices"] == 8 and found["bytes_sent"]["all-reduce"] > 0 and found["done"] > found["formula"] > 0


@pytest.mark.parametrize(("dispatch", "alike"), [("replicate", 2), ("all-to-all", 1)])
def test_a_program_that_gathers_tokens_or_hides_what_it_sends_is_refused(dispatch, alike, monkeypatch):
    """Along expert devices have the same tokens, or each its own."""
    program = mock.MagicMock()
    program.spec = transformer.spec(MODEL, 3)
    monkeypatch.setattr(scaling.assemble, "assemble", lambda *_: program)
    for n in (1, 2):
        gather = Collective("all-gather", ((2 * n * ROWS * LENGTH, 16),), 4, ((0, 2), (1, 3)), 0, 1)
        monkeypatch.setattr(scaling, "read", lambda *_, gather=gather: Reading((gather,), 0, 0, 0))
        with pytest.raises(ValueError, match="tokens are gathered") if n == alike else nullcontext():
            scaling.measure(CONFIG, MeshConfig(2, 2, 2, dispatch=dispatch), ROWS, LENGTH)
    monkeypatch.setattr(scaling, "read", lambda *_: Reading((), 0, 1, 0))
    with pytest.raises(ValueError, match="1 collectives in loops of unknown length"):
        scaling.measure(CONFIG, MeshConfig(2, 2, 2, dispatch=dispatch), ROWS, LENGTH)


def test_numbers_of_devices_that_have_no_split(capsys):
    with pytest.raises(SystemExit, match="2"):
        scaling.main(["--devices", "6"])
    assert "multiples of 4" in capsys.readouterr().err
