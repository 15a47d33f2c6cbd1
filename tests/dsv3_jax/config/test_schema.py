"""Every option has a meaning in ``--help``."""

import ast
import inspect

import pytest

from dsv3_jax.config import schema

SECTIONS = ("RopeScaling", "ModelConfig", "DataConfig", "TrainConfig", "OptimConfig", "LossConfig", "MeshConfig")


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_of_a_section_has_a_docstring(section):
    (body,) = (
        node.body
        for node in ast.parse(inspect.getsource(schema)).body
        if isinstance(node, ast.ClassDef) and node.name == section
    )
    told = {
        field.target.id
        for field, after in zip(body, [*body[1:], None], strict=True)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str)
    }
    fields = {field.target.id for field in body if isinstance(field, ast.AnnAssign)}
    assert fields == told
