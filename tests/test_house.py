"""Rules of the house, read from the source: who imports whom, sizes, public names, and what a plain import costs."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A file imports only from files above it. A folder stands for all of its files.
ORDER = {
    "activations": (
        "lazy",
        "errors",
        "untrusted",
        "tensors",
        "manifests",
        "adapters",
        "quantised",
        "bnb_layout",
        "packed_formats",
        "checkpoints",
        "weights",
        "hook_points",
        "self_test",
        "models",
        "loading",
        "prompts",
        "tokens",
        "batching",
        "packing",
        "reuse",
        "forward",
        "hdf5",
        "provenance",
        "store",
        "results",
        "background",
        "stream",
        "answers",
        "extract",
    ),
    "probes": (
        "execute",
        "records",
        "metrics",
        "probe",
        "rows",
        "logistic",
        "discriminant",
        "folds",
        "crossval",
        "train",
        "sweep",
        "estimator",
        "token_probe",
        "calibration",
        "baselines",
        "evaluate",
        "worth",
        "ensemble",
        "transfer",
        "leace",
        "hygiene",
        "causal",
        "english",
        "encodings",
        "imitations",
        "recognition",
        "key_search",
        "squares",
        "cryptanalysis",
        "spectra",
        "pairs",
        "block_sums",
        "alignment",
        "change",
        "weight_records",
        "adapter_diff",
        "weight_diff",
        "nearest",
        "activation_diff",
        "added_shift",
        "bands",
        "localise",
        "diff",
        "voice",
        "lens",
        "reference",
        "leaks",
        "comprehension",
        "obedience",
        "detectors",
        "bank",
        "harmless",
        "synthesize",
        "verdict",
        "batch",
        "wording",
        "explain",
        "record_files",
        "scan",
        "plots",
        "diff_plots",
        "report",
        "console",
        "diff_command",
        "demo",
        "doctor",
        "cli",
    ),
}
MODULES = sorted(path for package in ORDER for path in (ROOT / package).rglob("*.py"))
LONGEST_FILE, LONGEST_FUNCTION, MOST_POSITIONAL = 400, 60, 5


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def place_of(module: str) -> tuple[int, int]:
    """Package and row in the order; a package itself, which is lazy, comes last of its own."""
    package, _, rest = module.partition(".")
    row = ORDER[package].index(rest.split(".")[0]) if rest else len(ORDER[package])
    return list(ORDER).index(package), row


def imports_of(path: Path) -> list[tuple[str, int]]:
    """Modules of ours that a file imports anywhere, with the line; what only a type checker reads is left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name if is_module(name) else node.module, node.lineno) for name in inner]
    return [(name, line) for name, line in found if name.split(".")[0] in ORDER]


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def functions_of(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("package", ORDER)
def test_every_module_has_its_place_in_the_order(package):
    found = {name_of(path).split(".")[1] for path in MODULES if name_of(path).startswith(f"{package}.")}
    assert found == set(ORDER[package]), "mend ORDER in this file, and the picture in ARCHITECTURE.md"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_file_imports_only_from_files_above_it(path):
    own = name_of(path)
    for imported, line in imports_of(path):
        same_folder = imported.split(".")[:2] == own.split(".")[:2]
        assert same_folder or place_of(imported) < place_of(own), (
            f"{own}:{line} imports {imported}, which stands below it"
        )


def test_the_import_rule_can_fail(tmp_path):
    """Positive control: the reader sees an import of the other package, inside a function too."""
    offender = tmp_path / "offender.py"
    offender.write_text("def f():\n    from probes.records import Item\n")
    assert imports_of(offender) == [("probes.records", 2)]
    assert place_of("probes.records") > place_of("activations.answers")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) < LONGEST_FILE
    for function in functions_of(path):
        length = function.end_lineno - function.lineno + 1 - docstring_lines(function)
        assert length <= LONGEST_FUNCTION, f"{function.name}: {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_at_most_five_parameters_are_positional(path):
    for function in functions_of(path):
        if any("app.command" in ast.unparse(decorator) for decorator in function.decorator_list):
            continue  # typer reads the options of a command from its parameters
        positional = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
        count = len([name for name in positional if name not in ("self", "cls")])
        assert count <= MOST_POSITIONAL, f"{function.name}: {count}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_public_names_exist_and_are_sorted_as_ruff_sorts(path):
    listed = public_names(path)
    assert listed == sorted(listed, key=lambda name: (not name.isupper(), not name[0].isupper(), name))
    assert set(listed) <= top_level_names(path)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_another_file_imports_is_public_there(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        home = ROOT / f"{(getattr(node, 'module', None) or '').replace('.', '/')}.py"
        if isinstance(node, ast.ImportFrom) and home in MODULES:
            missing = {alias.name for alias in node.names} - set(public_names(home))
            assert not missing, f"line {node.lineno} imports {missing}, which __all__ of {node.module} lacks"


@pytest.mark.parametrize("package", ORDER)
def test_every_name_of_a_package_can_be_imported(package):
    module = importlib.import_module(package)
    for name in module.__all__:
        assert callable(getattr(module, name))


def public_names(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (listed,) = (ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign) and is_all(node))
    return listed


def top_level_names(path: Path) -> set[str]:
    """Names that a file defines or imports, those in conditional blocks included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def docstring_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    if ast.get_docstring(function) is None:
        return 0
    return first.end_lineno - first.lineno + 1


def is_all(node: ast.Assign) -> bool:
    return any(isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets)


LOADED = "\nimport sys\nprint(sorted({'torch', 'transformers', 'sklearn'} & set(sys.modules)), file=sys.stderr)"


def run_python(code: str) -> str:
    """What a fresh interpreter says on stderr."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    return done.stderr.strip()


@pytest.mark.parametrize(
    "code",
    [
        "import activations, probes",
        "import activations.errors",
        "import probes.records, probes.report",
        "from probes.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from probes.cli import main\ntry: main(['schema'])\nexcept SystemExit: pass",
    ],
)
def test_what_needs_no_model_loads_no_torch(code):
    assert run_python(code + LOADED) == "[]"


def test_the_torch_rule_can_fail():
    assert run_python("import sys\nsys.modules['torch'] = sys" + LOADED) == "['torch']"


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["dev"], *extras["notebooks"]]
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert {re.match(r"[\w-]+", line)[0] for line in wanted} <= set(pins)
    assert pins["torch"] == "2.13.0"
