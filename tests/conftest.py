"""Every test runs with array types checked (jaxtyping + beartype), promotion strict, and warnings as errors."""

import gc
import math
import signal
import subprocess
import sys

if "pytest" in sys.modules:  # not where a test's own process imports this
    gc.disable()  # until all is imported, a sixth of whose time it took

from shared.typechecks import check_types

# Before the packages are imported: their annotated signatures become checks.
check_types("rehyat_jax", "pallas_kernels", "train")

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # A shell's background job inherits SIGINT ignored, and so would the programs that tests interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)

from shared import tiers  # noqa: E402
from shared.programs import compile_for_values, keep_programs  # noqa: E402

# Before JAX is imported, which reads the variables; child processes inherit them.
compile_for_values()
keep_programs()

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Parity with float32 references is parity of float32 arithmetic, on every backend.
jax.config.update("jax_default_matmul_precision", "highest")


def pytest_addoption(parser):
    group = parser.getgroup("tiers", "which tests run (tests/shared/tiers.py)")
    group.addoption("--tier", choices=tiers.TIERS, default="test", help="default: %(default)s")
    group.addoption(
        "--record",
        choices=("new", "larger"),
        help="write what tests cost to tests/durations.json: new figures, or only those larger than before",
    )


def pytest_configure(config):
    tiers.tier = config.option.tier
    hypothesis.settings.register_profile("tier", max_examples=tiers.examples(100), deadline=None)
    hypothesis.settings.load_profile("tier")
    config.pluginmanager.register(Recorder(config.option.record), "durations")


def pytest_collection_modifyitems(config, items):
    """Only the tier's; files that take longest first, so that no worker is left with one at the end. What was never
    recorded may be long."""
    costs = tiers.Costs()
    chosen = [item for item in items if tiers.runs(item, costs)]
    config.hook.pytest_deselected(items=[item for item in items if not tiers.runs(item, costs)])
    items[:] = sorted(chosen, key=lambda item: -costs.files.get(item.nodeid.partition("::")[0], math.inf))
    # What was imported stays; a trace makes so many objects that looking for garbage among them took 7 % of the time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)
    gc.enable()


class Recorder:
    """CPU seconds of each call and each set-up of a fixture, gathered from all workers."""

    def __init__(self, mode: str | None) -> None:
        self.mode, self.files, self.tests, self.fixtures, self.pending = mode, {}, {}, {}, []

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef):
        before = tiers.cpu_seconds()
        try:
            return (yield)
        finally:
            self.pending.append((tiers.fixture_name(fixturedef), tiers.cpu_seconds() - before))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        before = tiers.cpu_seconds()
        try:
            return (yield)
        finally:
            item.user_properties.append(("cpu_seconds", tiers.cpu_seconds() - before))
            item.user_properties.append(("fixtures", self.pending))
            self.pending = []

    def pytest_runtest_logreport(self, report):
        if report.when != "call":
            return
        given = dict(report.user_properties)
        name, cost, fixtures = (
            tiers.function_of(report.nodeid),
            given.get("cpu_seconds", 0.0),
            given.get("fixtures", ()),
        )
        file = name.partition("::")[0]
        self.files[file] = self.files.get(file, 0.0) + cost + sum(seconds for _, seconds in fixtures)
        for fixture, seconds in fixtures:
            self.fixtures[fixture] = max(seconds, self.fixtures.get(fixture, 0.0))
        if "full" not in report.keywords:  # which no check would run
            self.tests[name] = self.tests.get(name, 0.0) + cost

    def pytest_sessionfinish(self, session):
        if self.mode and not hasattr(session.config, "workerinput"):
            tiers.Costs().write(files=self.files, tests=self.tests, fixtures=self.fixtures, keep=self.mode == "larger")


@pytest.fixture
def x64():
    """float64 for the length of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory):
    """Nothing is read from the user's own cache, where another compiler's results lie, and nothing is left there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REHYAT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_file():
    """Compiled programs end with their file.

    Each holds a few dozen memory mappings, of which Linux gives a process 65,530; beyond, XLA dies of a segmentation
    fault. And a file's programs do not depend on which ran before it.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="module")
def compiled_for_speed():
    """Programs compiled as a user's are, in child processes too: for a file of tests that compute more than they
    compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
        jax.config.update("jax_disable_most_optimizations", False)
        yield
        jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a real file system of 256 KiB; where mounting is not allowed, a limit on file sizes."""
    import resource

    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode == 0:
        yield folder
        subprocess.run(["umount", folder], check=True)
        return
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (256 * 1024, before[1]))
    yield folder
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)
