"""What may not stand in the code at all. Run: python -m pytest tests/test_source.py"""

import ast

import pytest

from conftest import ROOT

FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")])
UNPICKLERS = {"recordio.py"}  # verification sets are pickles; its find_class always raises


def offences(tree: ast.AST, name: str) -> list[str]:
    found = []
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        for module in modules:
            if module.split(".")[0] in ("pickle", "cPickle", "dill", "marshal", "shelve") and (
                name not in UNPICKLERS
            ):
                found.append(f"line {node.lineno}: imports {module}")
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        called = node.func.id if isinstance(node.func, ast.Name) else called
        if isinstance(node.func, ast.Name) and called in ("eval", "exec"):
            found.append(f"line {node.lineno}: {called}()")
        if called in ("extractall", "system", "popen") or called in (
            "all_gather_object", "broadcast_object_list", "gather_object",  # these pickle
        ):  # fmt: skip
            found.append(f"line {node.lineno}: {called}()")
        words = {word.arg: word.value for word in node.keywords}
        for word, bad in (("shell", True), ("weights_only", False), ("allow_pickle", True)):
            value = words.get(word)
            if value is not None and not (
                isinstance(value, ast.Constant) and value.value is not bad
            ):
                found.append(f"line {node.lineno}: {word}={ast.unparse(value)}")
        loads = isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "torch.load"
        if loads and "weights_only" not in words:
            found.append(f"line {node.lineno}: torch.load without weights_only=True")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_row42_nothing_in_the_code_runs_what_a_file_says(path):
    assert offences(ast.parse(path.read_text()), path.name) == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "eval(x)", "exec(x)", "tar.extractall(x)",
        "os.system(x)", "subprocess.run(x, shell=True)", "torch.load(x)", "run(x, shell=y)",
        "torch.load(x, weights_only=False)", "numpy.load(x, allow_pickle=True)",
        "dist.all_gather_object(x, y)",
    ],
)  # fmt: skip
def test_the_scan_sees_it(line):
    assert offences(ast.parse(line), "x.py")
    assert not offences(ast.parse("model.eval(); torch.load(x, weights_only=True)"), "x.py")
