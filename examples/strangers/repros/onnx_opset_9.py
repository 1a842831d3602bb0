import numpy as np
from onnx.parser import parse_model
from onnx.reference import ReferenceEvaluator

x = np.array([[1.0], [3.0]], "float32")
one, zero = np.ones(1, "float32"), np.zeros(1, "float32")
for opset in (7, 8, 9, 13, 14):
    model = parse_model(
        f'<ir_version: 8, opset_import: ["": {opset}]>'
        "g (float[2,1] x, float[1] s, float[1] b, float[1] m, float[1] v) => (float[2,1] y)"
        "{ y = BatchNormalization(x, s, b, m, v) }"
    )
    try:
        (y,) = ReferenceEvaluator(model).run(None, {"x": x, "s": one, "b": zero, "m": zero, "v": one})
        print(f"opset {opset}: x = 1 and 3, mean 0, variance 1 gives {y[0, 0]:.2f} and {y[1, 0]:.2f}")
    except TypeError as error:
        print(f"opset {opset}: TypeError:", str(error)[:45])
