"""The bounds of the flow's parameters, and the reasons for them."""

import argparse
import inspect

import ml_workflow
from workflow.cli import parse_as

import pytest
from prefect.exceptions import ParameterTypeError
from pydantic import TypeAdapter

PARAMETERS = inspect.signature(ml_workflow.ml_workflow.fn).parameters
KINDS = {name: parameter.annotation for name, parameter in PARAMETERS.items()}


@pytest.mark.refused("parameters: a number out of bounds")
@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("learning_rate", "1e30", "diverges"),
        ("learning_rate", "1.0001", "diverges"),
        ("learning_rate", "nan", "finite"),
        ("learning_rate", "inf", "input"),
        ("learning_rate", "0", "greater than 0"),
        ("epochs", "1000000000", "days"),
        ("batch_size", "100001", "days"),
        ("dropout", "0.99999999", "features"),
        ("dropout", "-0.1", "greater than or equal to 0"),
        ("seed", "4294967296", "seed"),
        ("name", "a/b", "letters"),
        ("name", "it's", "letters"),
        ("name", "x" * 101, "letters"),
        ("name", "a\n", "letters"),
    ],
)
def test_value_out_of_bounds_is_refused_with_the_reason(name, value, reason):
    with pytest.raises(argparse.ArgumentTypeError, match=reason):
        parse_as(KINDS[name])(value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("learning_rate", "1"), ("dropout", "0"), ("name", ""), ("name", "Äpfel 2.0")],
)
def test_value_within_the_bounds_is_accepted(name, value):
    assert str(parse_as(KINDS[name])(value)).startswith(value)


def test_form_shows_the_bounds():
    schema = TypeAdapter(KINDS["learning_rate"]).json_schema()
    assert (schema["type"], schema["exclusiveMinimum"], schema["maximum"]) == ("number", 0, 1)
    with pytest.raises(ParameterTypeError, match="diverges"):
        ml_workflow.ml_workflow.validate_parameters({"learning_rate": 2.0})
