"""How processes share the tests: a file's stay in one, in their order, so that what its fixtures make is made once."""

import contextlib

import pytest

# Files that share what is made once in a process; they go to one of the processes.
TOGETHER = {
    "tests/test_demo.py": "digits",
    "tests/test_eval_models.py": "digits",
    "tests/test_reproduce.py": "reproduced",
    "tests/test_report_browser.py": "reproduced",
}

# What takes longest, handed out first, slow tests and others alike: what is left for the end is short.
FIRST = (
    "tests/test_simt.py",
    "tests/test_emulated.py",
    "digits",
    "reproduced",
    "tests/test_bench_gpu.py",
    "tests/test_software_gpu.py",
    "tests/test_examples.py",
    "tests/test_build.py",
    "tests/test_embed_killed.py",
    "tests/test_fuzz.py",
    "tests/test_wheel.py",
    "tests/test_family_ranks.py",
    "tests/test_masked_lse.py",
    "tests/test_image_modes.py",
    "tests/test_files.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        """xdist's, which after a crash gives the test that crashed, and files that are done, to the next process.

        The former crashes that one too; with nothing to do, or with one test alone, a process waits for more forever.
        """

        def _split_scope(self, nodeid):
            path = nodeid.split("::", 1)[0]
            return TOGETHER.get(path, path)

        def _reschedule(self, node):
            while self.workqueue and not node.shutting_down and self._pending_of(self.assigned_work[node]) <= 2:
                self._assign_work_unit(node)
            super()._reschedule(node)

        def _assign_work_unit(self, node):
            for name in reversed([name for name in FIRST if name in self.workqueue]):
                self.workqueue.move_to_end(name, last=False)
            with contextlib.suppress(OSError):  # a process that is dead already: remove_node gives its files to others
                super()._assign_work_unit(node)

        def remove_node(self, node):
            files = self.assigned_work.pop(node)
            left = [(test, tests) for tests in files.values() for test, done in tests.items() if not done]
            if not left:
                return None
            crashed, tests = left[0]
            tests[crashed] = True
            self.workqueue.update({file: tests for file, tests in files.items() if not all(tests.values())})
            for other in self.assigned_work:
                self._reschedule(other)
            return crashed

    return ByFile(config, log)
