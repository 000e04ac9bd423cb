"""Turn an exported decoder's past_key_values and present into state inside the OpenVINO model.

Legend: B batch, P tokens in the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

PAST, PRESENT = "past_key_values.", "present."


def make_stateful(model: Any) -> None:
    """Change an ov.Model in place: the caches become ReadValue and Assign, empty at the start and re-ordered by a new
    input `beam_idx` [B] int32. What else it takes and gives stays."""
    import openvino as ov
    from openvino import opset15 as op
    from openvino._offline_transformations import apply_make_stateful_transformation

    beams = op.parameter([-1], ov.Type.i32, name="beam_idx")
    beams.output(0).get_tensor().set_names({"beam_idx"})
    pasts = [port for port in model.inputs if port.get_any_name().startswith(PAST)]
    for port in pasts:
        readers = port.get_target_inputs()
        ordered = op.gather(port, beams, op.constant(np.array(0, np.int64)))
        for reader in readers:
            reader.replace_source_output(ordered.output(0))
    model.add_parameters([beams])
    names = [port.get_any_name() for port in pasts]
    apply_make_stateful_transformation(model, {name: name.replace(PAST, PRESENT, 1) for name in names})
    ids = model.input("input_ids")
    batch = op.gather(op.shape_of(ids), op.constant(np.array([0], np.int64)), op.constant(np.array(0, np.int64)))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            inner = [dim.get_length() if dim.is_static else 0 for dim in list(node.get_output_partial_shape(0))[1:]]
            shape = op.concat([batch, op.constant(np.array(inner, np.int64))], 0)
            node.set_arguments([op.broadcast(op.constant(np.array(0, np.float32)), shape)])
    model.validate_nodes_and_infer_types()
