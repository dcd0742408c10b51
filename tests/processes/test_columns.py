"""Columns of three processes, gathered on the CPU by the main process; each is one `columns_worker`."""

import columns_worker
import pytest
import torch
import torch.distributed as dist
import workers

from hf_importance.report.columns import Columns
from hf_importance.sampling.shard import Shard

EXAMPLES, RANKS = columns_worker.EXAMPLES, 3


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results of the ranks, by backend."""
    folder = tmp_path_factory.mktemp("columns")
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={RANKS}")
    workers.run("processes/columns_worker.py", folder, launcher=launcher)
    return [torch.load(path) for path in sorted(folder.glob("rank*.pt"))]


@pytest.fixture(params=columns_worker.BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def ranks(backend, results):
    """Results of the ranks with one backend."""
    return [result[backend] for result in results]


def assert_same(columns, expected):
    """Equal bit for bit, NaN included."""
    assert columns.keys() == expected.keys()
    for name, column in columns.items():
        assert column.dtype == expected[name].dtype
        assert torch.equal(column.isnan(), expected[name].isnan())
        assert torch.equal(column.nan_to_num(-1), expected[name].nan_to_num(-1))


@pytest.fixture(scope="module")
def expected():
    """The columns of a single process, which has nothing to gather."""
    assert not dist.is_initialized(), "premise"
    columns = Columns(columns_worker.sampler_of(Shard(EXAMPLES)), first=True)
    before = columns.all_columns()
    columns.gather(timeout=1)
    assert_same(columns.all_columns(), before)
    return before


def test_main_process_has_all_columns_exactly(ranks, expected):
    assert_same(ranks[0]["columns"], expected)
    visits = ranks[0]["columns"]["visits"]
    assert visits.dtype == torch.int32
    assert (visits.float().int() != visits).any(), "control: float32 is not exact"
    assert expected["importance"].isnan().any(), "control: some are unknown"
    assert expected["label"].isnan().any()


def test_all_processes_have_all_importances(ranks, expected):
    for rank in ranks:
        assert_same({"importance": rank["importances"]}, {"importance": expected["importance"]})


def test_other_processes_only_have_the_importances_of_others(ranks, expected):
    for rank in ranks[1:]:
        others = torch.ones(EXAMPLES, dtype=torch.bool).index_fill(0, rank["index"], False)
        assert rank["columns"]["mean_loss"][others].isnan().all()
        assert (rank["columns"]["visits"][others] == 0).all()
        assert torch.equal(rank["columns"]["visits"][~others], expected["visits"][~others])


def test_main_process_has_what_another_training_may_start_from(ranks, expected):
    """Nothing has been trained here, so it is what is remembered."""
    assert_same({"importance": ranks[0]["for_another_training"]}, {"importance": expected["importance"]})
    assert ranks[1]["for_another_training"].isnan().sum() > expected["importance"].isnan().sum(), "control"


def test_control_nothing_of_others_is_known_before(ranks):
    for rank in ranks:
        others = torch.ones(EXAMPLES, dtype=torch.bool).index_fill(0, rank["index"], False)
        assert rank["before"]["importance"][others].isnan().all()
        assert others.sum() in (6, 7)


def test_each_process_sends_its_own_examples_and_receives_importances(ranks, backend):
    """On the CPU, with the position of each example. A group for CPU tensors is created at most once."""
    for rank in ranks:
        own = (len(rank["columns"]) + 2) * -(-EXAMPLES // RANKS)
        created = [] if backend == "gloo" else [("new_group",)]
        assert rank["calls"] == created + [("gather", (own, "cpu")), ("broadcast", (EXAMPLES, "cpu"))] * 2
        assert own < len(rank["columns"]) * EXAMPLES, "control: all columns of all examples are more"
