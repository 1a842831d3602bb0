import warnings

import numpy as np
from onnx.parser import parse_model
from onnx.reference import ReferenceEvaluator

warnings.simplefilter("ignore")  # NumPy's, of an overflow
model = parse_model(
    '<ir_version: 8, opset_import: ["": 15]>'
    "g (float16[2,1] x, float[1] s, float[1] b, float[1] m, float[1] v)"
    "=> (float16[2,1] y, float[1] mean, float[1] var)"
    "{ y, mean, var = BatchNormalization <training_mode=1> (x, s, b, m, v) }"
)
one, zero = np.ones(1, "float32"), np.zeros(1, "float32")
x = np.array([[-300], [300]], "float16")
y, mean, var = ReferenceEvaluator(model).run(None, {"x": x, "s": one, "b": zero, "m": zero, "v": one})
print("Y is", y.ravel(), "and the running variance", var, var.dtype)
