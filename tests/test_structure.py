"""The design's rules of import and of size, read from the source."""

import ast

import pytest

from tests.helpers import ROOT

# Lines.
MAX_FILE, MAX_FUNCTION, MAX_TRAIN, MAX_PACKAGE = 400, 80, 80, 11350
# Who may not import whom: modules or packages of imgcls.
FORBIDDEN = {
    "models steps task state optim augment": "run",
    "run": "models steps task state optim augment experiment config data evaluation inference cpu",
    "evaluation inference": "train",
}
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "imgcls").rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}


def imports(module: str) -> set[str]:
    """The modules of imgcls that a module imports, in functions too."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & FILES.keys()
            found |= submodules or {node.module}
    return found & FILES.keys()


def inside(module: str, places: str) -> bool:
    return any(f"{module}.".startswith(f"imgcls.{place}.") for place in places.split())


def test_imports_point_one_way():
    wrong = [
        (module, other)
        for module in FILES
        for other in imports(module)
        for who, whom in FORBIDDEN.items()
        if inside(module, who) and inside(other, whom)
    ]
    assert not wrong


def test_only_experiment_imports_cpu():
    users = {module for module in FILES for other in imports(module) if inside(other, "cpu")}
    assert {module for module in users if not inside(module, "cpu")} == {"imgcls.experiment"}


def test_no_module_imports_itself_by_way_of_others():
    left = {module: imports(module) for module in FILES}
    while free := [module for module, others in left.items() if not others & left.keys()]:
        for module in free:
            del left[module]
    assert not left


@pytest.mark.parametrize("module", FILES)
def test_no_file_or_function_is_long(module):
    length = lambda path: len(path.read_text().splitlines())
    assert length(FILES[module]) <= MAX_FILE
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            is_train = (module, node.name) == ("imgcls.train", "train")
            assert lines <= (MAX_TRAIN if is_train else MAX_FUNCTION), node.name


def test_the_package_is_read_in_one_sitting():
    lines = {module: len(path.read_text().splitlines()) for module, path in FILES.items()}
    assert sum(lines.values()) <= MAX_PACKAGE
