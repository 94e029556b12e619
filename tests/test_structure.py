"""The house rules: jobs → pipeline → models, light imports, no machine's name in the code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cli import JOBS

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "models": {"models"},
    "pipeline": {"models", "pipeline"},
    "jobs": {"models", "pipeline", "jobs"},
}
KNOW_RAY = {"pipeline/run/ray.py", "jobs/doctor.py", "jobs/train_ray.py"}
HEAVY = {"torch", "ray", "transformers", "open_clip", "onnxruntime", "rapidocr", "cv2", "av"}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_dependencies_point_from_jobs_to_pipeline_to_models_only(package: str):
    for path in (ROOT / package).rglob("*.py"):
        beyond = imports(path) & {"jobs", "pipeline", "models", "tests", "bench"} - MAY_IMPORT[package]
        assert not beyond, f"{path.relative_to(ROOT)} imports {beyond}"


def modules_imported(path: Path) -> set[str]:
    """Files of this repository that a file imports, as dotted names, wherever in it the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if (ROOT / f"{name.replace('.', '/')}.py").is_file()}


def graph_of(package: str, key) -> dict[str, set[str]]:
    """Who imports whom among the files of a package, or among what `key` makes of their names."""
    graph: dict[str, set[str]] = {}
    for path in (ROOT / package).rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        to = {key(m) for m in modules_imported(path) if m.startswith(f"{package}.")}
        graph.setdefault(key(name), set()).update(to - {key(name)})
    return graph


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """A path that comes back to where it began; [] where there is none."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return []
        for to in sorted(graph.get(node, ())):
            if found := visit(to, [*path, node]):
                return found
        done.add(node)
        return []

    return next((found for node in sorted(graph) if (found := visit(node, []))), [])


def folder_of(name: str) -> str:
    """'pipeline.split' of 'pipeline.split.cut'; a file that lies in the package itself stands for itself."""
    return ".".join(name.split(".")[:2])


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_file_imports_itself_by_a_detour(package: str):
    assert circle_in(graph_of(package, lambda name: name)) == []


@pytest.mark.parametrize("package", ["models", "pipeline"])
def test_no_folder_imports_itself_by_a_detour(package: str):
    assert circle_in(graph_of(package, folder_of)) == []


def test_the_circle_test_finds_circles():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_only_the_files_that_start_it_know_ray():
    for package in MAY_IMPORT:
        for path in (ROOT / package).rglob("*.py"):
            if path.relative_to(ROOT).as_posix() not in KNOW_RAY:
                assert "ray" not in imports(path), path


def loaded_by(*command: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `clipmill COMMAND`."""
    code = (
        "import sys\nfrom jobs.cli import main\n"
        f"try: main({list(command)!r})\nexcept SystemExit: pass\n"
        "print('\\n' + ' '.join({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("job", JOBS)
def test_help_imports_nothing_heavy(job: str):
    loaded = loaded_by(job, "--help")
    assert not loaded & (HEAVY | {"pyarrow", "numpy", "pydantic"})


@pytest.mark.parametrize("job", JOBS)
def test_help_teaches_with_an_example(job: str):
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", job, "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    )
    assert f"clipmill {job}" in done.stdout.split("usage:", 1)[1].split("\n", 1)[1], done.stdout


def test_an_unknown_job_is_one_line_and_exit_2():
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "curatte"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "curatte" in done.stderr
    assert "curate" in done.stderr


def test_every_model_file_opens_with_what_it_is():
    for package in MAY_IMPORT:
        for path in (ROOT / package).rglob("[!_]*.py"):
            assert ast.get_docstring(ast.parse(path.read_text())), path
