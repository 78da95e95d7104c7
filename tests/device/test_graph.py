"""Decode steps that are captured and replayed: the tokens of ordinary steps, and nothing of the
host in them.
"""

from __future__ import annotations

import pytest
import torch

from specache.device.step import StaticPass
from tests.device.simulated_graph import NotPermitted, SimulatedGraphs
from tests.device.static_running import answer, assert_equal, config, static_steps
from tests.tiny import llama

pytestmark = pytest.mark.usefixtures("torch_kernels")


@pytest.fixture(scope="module")
def model():
    return llama(num_hidden_layers=2)


@pytest.fixture
def graphs():
    return SimulatedGraphs()


@pytest.mark.parametrize(
    ("policy", "new"), [("verified", 110), ("speculative", 80), ("on-demand", 80), ("previous", 60), ("none", 110)]
)
def test_replays_give_the_ordinary_tokens(model, monkeypatch, graphs, policy, new):
    """Two sequences of different lengths quantise several groups, with a small hot set, and outgrow
    their buffers.
    """
    settings = config(policy=policy)
    eager = answer(model, settings, (150, 97), new)
    with static_steps(monkeypatch, graphs=lambda device: graphs) as steps:
        static = answer(model, settings, (150, 97), new)
    assert steps == [2] * (new - 1)
    assert graphs.captures >= 2  # one or two for each size of the buffers
    assert graphs.replays >= new - 10  # every other step warms up
    # on a processor with AMX one key, at the edge of two codes, gets the other one: 4e-5
    assert_equal(static, eager, limit=1e-4)


def test_a_position_of_the_host_in_a_launch_is_found(model, monkeypatch, graphs):
    """The same slot of the residual at every replay."""
    attention = StaticPass.attention

    def append_where_the_host_says(self, index, *arguments):
        slot = self._batch.layers[index].layers[0].residual_count
        self._seen.slot = torch.full_like(self._seen.slot, slot)
        return attention(self, index, *arguments)

    settings = config()
    eager = answer(model, settings, (150,), 30)
    monkeypatch.setattr(StaticPass, "attention", append_where_the_host_says)
    with static_steps(monkeypatch):
        assert_equal(answer(model, settings, (150,), 30), eager)  # without a graph the host is right
    with static_steps(monkeypatch, graphs=lambda device: graphs):
        static = answer(model, settings, (150,), 30)
    assert graphs.replays
    assert not torch.equal(static.sequences, eager.sequences)


@pytest.mark.parametrize("planted", [lambda x: x.sum().item(), lambda x: x[x >= 0], lambda x: torch.tensor([1])])
def test_a_failed_capture_warns_and_steps_go_on(model, monkeypatch, graphs, planted):
    attention = StaticPass.attention

    def attend_and_wait(self, index, query, *arguments):
        planted(query)
        return attention(self, index, query, *arguments)

    settings = config()
    eager = answer(model, settings, (150,), 20)
    monkeypatch.setattr(StaticPass, "attention", attend_and_wait)
    with static_steps(monkeypatch, graphs=lambda device: graphs) as steps, pytest.warns(RuntimeWarning, match="not permitted"):
        static = answer(model, settings, (150,), 20)
    assert_equal(static, eager)
    assert steps == [1] * 19
    assert graphs.captures == 0


def test_a_simulated_capture_runs_nothing_and_leaves_garbage(graphs):
    counter, once = torch.zeros(3), torch.ones(3)

    def run():
        counter.add_(1)
        return counter * 2 + once

    replay, result = graphs.capture(run)
    assert counter.tolist() == [0, 0, 0]
    assert result.isnan().all()
    for expected in (3, 5):
        replay()
        assert result.tolist() == [expected] * 3


def test_a_simulated_capture_refuses_a_read(graphs):
    with pytest.raises(NotPermitted):
        graphs.capture(lambda: torch.ones(3).nonzero())
