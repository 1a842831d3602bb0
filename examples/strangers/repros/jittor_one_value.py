import jittor as jt

layer = jt.nn.BatchNorm(3)
y = layer(jt.array([[4.0, 8.0, 16.0]]))
print("Y is", y.numpy()[0], "and the running variance", layer.running_var.numpy())
