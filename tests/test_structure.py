"""Measures of style: each is exact on an example made by hand."""

import sys
import textwrap
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks are beside the package, not in it

from benchmarks.structure import style


def measured(source: str) -> style.Measures:
    """The measures of one file."""
    measures = style.Measures()
    style.add_source(measures, textwrap.dedent(source), "file.py")
    return measures


def test_docstrings_blank_lines_and_comments_are_no_code() -> None:
    measures = measured(
        '''
        """What a file is."""

        # alone
        LIMIT = 3  # behind
        """Of something."""
        OTHER = 4  # noqa: X
        '''
    )
    assert (measures.code_lines, measures.comment_lines) == (2, 2)
    assert measures.row()["comments %"] == pytest.approx(66.7)
    assert [text for _, text in measures.riddles] == ["What a file is."]


def test_nodes_are_counted_without_contexts_and_docstrings() -> None:
    # Module, Assign, Name, BinOp, Constant, Add, Constant
    assert measured("x = 1 + 2\n").nodes == 7
    assert measured('"""Text."""\nx = 1 + 2\n').nodes == 8  # and the text


@pytest.mark.parametrize(
    ("body", "number"),
    [
        ("return 1", 1),
        ("return 1 if x else 2", 2),
        ("return x and y or z", 3),
        ("for i in x:\n        if i: pass", 3),
        ("return [i for i in x if i]", 3),
        ("try:\n        pass\n    except E:\n        pass", 2),
    ],
)
def test_mccabe_counts_branches(body: str, number: int) -> None:
    assert measured(f"def f(x):\n    {body}\n").branches == [("file.py:1 f", number)]


def test_length_of_a_function_is_without_its_docstring() -> None:
    source = 'def f():\n    """One.\n\n    Two.\n    """\n    x = 1\n    return x\n'
    assert measured(source).lengths == [("file.py:1 f", 3)]


def test_participles_are_names_that_are_assigned() -> None:
    measures = measured(
        "def f(found):\n    kept = found\n    name = kept\n    for given in name: pass\n"
    )
    assert [name for _, name in measures.participles] == ["kept", "given"]
    assert measures.row()["participles %"] == pytest.approx(66.7)


def test_comprehensions_and_long_lines_are_counted() -> None:
    measures = measured(f"x = [i for i in (j for j in y)]\n{'z' * 121} = 1\n")
    assert measures.comprehensions == 2
    assert measures.long_lines == ["file.py:2"]


def test_nine_tenths_do_not_exceed_the_percentile() -> None:
    assert style.percentile_90(list(range(1, 101))) == pytest.approx(90.1)
    assert style.percentile_90([4]) == 4
