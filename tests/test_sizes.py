"""The code stays small, spacious and in order: sizes of files and functions, density, imports."""
import ast
import io
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = sorted((ROOT / "m3ae_mini").glob("*.py"))
DATA = sorted((ROOT / "data").glob("*.py"))
SCRIPTS = [ROOT / "train.py", ROOT / "finetune.py"]
FILES = [*PACKAGE, *DATA, *SCRIPTS]

PACKAGE_LINES = 2200                   # lines of code: no blank lines, comments, docstrings
SCRIPT_LINES, FILE_LINES = 250, 350
FUNCTION_LINES, LONG_FUNCTIONS = 60, {"main": 100, "fit": 100}
COLUMNS = 100
TOKENS_PER_LINE = 9                    # of train.py and finetune.py, which students read first
README_WORDS = {"README.md": 2500, "data/README.md": 2500, "tests/README.md": 4500}
README_LINES = 300                     # of README.md

# A module of the package may import those of the groups above its own.
GROUPS = (
    {"config"},
    {"ops", "masking", "tokenizer", "foreign_files", "weight_names"},
    {"model", "loader"},
    {"objectives"},
    {"distributed"},
    {"checkpoint", "optim"},
    {"evaluate", "plots"},
    {"weights"},
    {"__init__"})


def relative(path):
    return str(path.relative_to(ROOT))


# ------------------------------------------------------------------------------------------- sizes

def docstring_lines(tree):
    """The line numbers of all docstrings."""
    lines = set()
    for node in ast.walk(tree):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        if documented and ast.get_docstring(node) is not None:
            lines |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def code_tokens(source):
    """(first line, last line) of each token of code; an f-string counts as one."""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER)
    f_string_start = getattr(tokenize, "FSTRING_START", None)          # Python 3.12 splits them
    f_string_end = getattr(tokenize, "FSTRING_END", None)
    docstrings, tokens, starts = docstring_lines(ast.parse(source)), [], []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == f_string_start:
            starts.append(token.start[0])
        start = token.start[0]
        if starts:
            if token.type != f_string_end:
                continue
            start = starts.pop()
            if starts:                                     # within another f-string
                continue
        if token.type not in layout and start not in docstrings:
            tokens.append((start, token.end[0]))
    return tokens


def code_lines(source):
    """The numbers of the lines that hold code."""
    return {line for first, last in code_tokens(source) for line in range(first, last + 1)}


def functions(source):
    """{name and line: lines of code} of every function, those within it included."""
    lines, found = code_lines(source), {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            own = range(node.lineno, node.end_lineno + 1)
            found[node.name, node.lineno] = len(lines.intersection(own))
    return found


SAMPLE = '''"""A docstring,
of two lines."""
import os                              # code


# a comment
def f(x):
    """Another."""
    text = f"{x + 1} and {f'{x}'}"

    return (text,
            """no docstring,
            but code""")
'''


def test_the_count_of_a_sample():
    assert code_lines(SAMPLE) == {3, 7, 9, 11, 12, 13}
    assert functions(SAMPLE) == {("f", 7): 5}
    # import os; def f ( x ) :; text = "…"; return ( text , "…" )
    assert len(code_tokens(SAMPLE)) == 2 + 6 + 3 + 6


def test_the_package_is_small():
    sizes = {relative(path): len(code_lines(path.read_text())) for path in PACKAGE}
    total = sum(sizes.values())
    print(f"m3ae_mini: {total:,} lines of code, at most {PACKAGE_LINES:,}")
    assert total <= PACKAGE_LINES, sizes


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_a_file_is_small(path):
    source = path.read_text()
    assert len(code_lines(source)) <= (SCRIPT_LINES if path in SCRIPTS else FILE_LINES)
    long = {name: size for (name, _), size in functions(source).items()
            if size > LONG_FUNCTIONS.get(name, FUNCTION_LINES)}
    assert not long
    wide = [number for number, line in enumerate(source.splitlines(), 1) if len(line) > COLUMNS]
    assert not wide


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_a_script_is_spacious(path):
    source = path.read_text()
    density = len(code_tokens(source)) / len(code_lines(source))
    print(f"{relative(path)}: {density:.2f} tokens a line of code, at most {TOKENS_PER_LINE}")
    assert density <= TOKENS_PER_LINE


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_an_assignment_sets_at_most_two_unlike_things(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            kinds = {type(value) for value in node.value.elts}
            names = getattr(node.targets[0], "elts", [])
            assert len(names) <= 2 or len(kinds) == 1, f"line {node.lineno}: one line for each"


@pytest.mark.parametrize("name", README_WORDS)
def test_a_readme_is_short(name):
    text = (ROOT / name).read_text()
    words = sum(any(map(str.isalnum, word)) for word in text.split())
    print(f"{name}: {words:,} words, at most {README_WORDS[name]:,}")
    assert words <= README_WORDS[name]
    assert name != "README.md" or len(text.splitlines()) <= README_LINES


# ----------------------------------------------------------------------------------------- imports

def imported(path):
    """The modules of m3ae_mini and data that a file imports, as "m3ae_mini.config"; a package as
    its "__init__"."""
    folder = path.parent.name
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = [folder] if node.level else []
            origin = ".".join(origin + ([node.module] if node.module else []))
            names |= {f"{origin}.{alias.name}" for alias in node.names}

    modules = set()
    for name in names:
        package, _, rest = name.partition(".")
        if package in ("m3ae_mini", "data"):
            module = rest.split(".")[0]
            is_file = module and (ROOT / package / f"{module}.py").is_file()
            modules.add(f"{package}.{module if is_file else '__init__'}")
    return modules


GRAPH = {f"{path.parent.name}.{path.stem}": imported(path) for path in [*PACKAGE, *DATA]}


def test_imports_make_no_circle():
    assert GRAPH["m3ae_mini.model"] >= {"m3ae_mini.config", "m3ae_mini.ops"}   # they are found
    left = dict(GRAPH)
    while left:
        free = [module for module, needed in left.items() if not needed & left.keys()]
        assert free, f"these import each other: {', '.join(sorted(left))}"
        for module in free:
            del left[module]


def test_the_package_does_not_import_the_data():
    for path in PACKAGE:
        assert not {name for name in imported(path) if name.startswith("data.")}, path


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_imports_point_one_way(path):
    rank = {f"m3ae_mini.{name}": i for i, names in enumerate(GROUPS) for name in names}
    module = f"m3ae_mini.{path.stem}"
    assert module in rank, f"put {path.stem} into one of GROUPS"
    wrong = {name for name in imported(path) if rank[name] >= rank[module]}
    assert not wrong


def test_data_imports_little_of_the_package():
    """Its settings and errors; what judges samples or uses a model reads those, too."""
    more_of = {"predict": {path.stem for path in PACKAGE}, "labels": {"loader"}, "confusion": {"plots"},
               "texts": {"loader", "tokenizer"},
               "report": {"__init__", "checkpoint", "distributed", "evaluate", "loader", "objectives"},
               "baselines": {"evaluate", "loader", "masking", "objectives"},
               "task_metrics": {"__init__", "checkpoint", "distributed", "evaluate", "loader"},
               "ranking": {"__init__", "distributed", "loader", "masking", "objectives"},
               "card": {"checkpoint"}, "few_pairs": {"checkpoint", "distributed"},
               "bag_of_words": {"__init__", "distributed", "loader"}}
    for path in DATA:
        used = {name for name in imported(path) if name.startswith("m3ae_mini.")}
        more = {f"m3ae_mini.{name}" for name in more_of.get(path.stem, ())}
        assert used <= {"m3ae_mini.config"} | more, path
