"""Small changes of a loaded OpenVINO model."""

from __future__ import annotations

from typing import Any

import numpy as np

_THROUGH = ("Result", "Convert", "Multiply", "Divide", "Tanh", "Add")
"""What may stand between the product that makes the logits and the output: soft caps, a bias."""


def last_logits_only(model: Any) -> bool:
    """Make a decoder's `logits` [B, 1, V], of the last token alone: a prompt is then read without the product of all
    its tokens with the vocabulary. False, and nothing changed, where that product is not found."""
    from openvino import opset15 as op

    node = model.output("logits").get_node()
    while node.get_type_name() in _THROUGH:
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MatMul":
        return False
    hidden = node.input_value(0)
    last = op.gather(hidden, op.constant(np.array([-1], np.int64)), op.constant(np.array(1, np.int64)))
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
    return True
