import jittor as jt

layer = jt.nn.BatchNorm(1)
y = layer(jt.array([[-300.0], [300.0]]).float16()).numpy()
variance = layer.running_var
print("Y is", y.ravel(), "and the running variance", variance.numpy(), variance.dtype)
