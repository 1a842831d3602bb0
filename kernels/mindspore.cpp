// What MindSpore's custom operators call: an operator's inputs and then its outputs, each an address, a shape and
// the name of a dtype. What is no tensor of the layer comes as a tensor of numbers, the plan.

#include <omp.h>

#include <cstring>

#include "rbn_kernels.h"

namespace {

// gamma, beta, center_weight, scale_weight, scale_bias, running mean and variance, (C) each. Those that the layer
// lacks are there too, and not read: the plan says so.
const int VECTORS = 7;

enum plan { CHANNELS_LAST, CENTERING, SCALING, RESTRICTION, THREADS, EPS, PRESENT, SIZE = PRESENT + VECTORS };

enum accumulation { NEW_WEIGHT, CORRECTION };

rbn_layer layer_of(int dimensions, const int64_t *shape, const char *dtype, const double *plan) {
  rbn_layer layer = {};
  layer.channels_last = plan[CHANNELS_LAST] != 0;
  const int axis = layer.channels_last ? dimensions - 1 : 1;
  layer.images = shape[0];
  layer.channels = shape[axis];
  layer.positions = 1;
  for (int i = 1; i < dimensions; i++)
    if (i != axis) layer.positions *= shape[i];
  layer.dtype = !strcmp(dtype, "float64")   ? RBN_FLOAT64
                : !strcmp(dtype, "float16") ? RBN_FLOAT16
                : !strcmp(dtype, "float32") ? RBN_FLOAT32
                                            : RBN_BFLOAT16;
  layer.centering = (int32_t)plan[CENTERING];
  layer.scaling = (int32_t)plan[SCALING];
  layer.restriction = (int32_t)plan[RESTRICTION];
  layer.batch_statistics = plan[SIZE - 1] == 0;
  layer.eps = plan[EPS];
  const int asked = (int)plan[THREADS], there = omp_get_max_threads(), most = asked < there ? asked : there;
  layer.threads = rbn_worthwhile_threads(layer.images, layer.channels, layer.positions, most);
  return layer;
}

rbn_parameters parameters_of(void **vectors, const double *plan) {
  const auto one = [&](int i) { return plan[PRESENT + i] ? vectors[i] : nullptr; };
  return {one(0), one(1), one(2), one(3), one(4), one(5), one(6)};
}

}  // namespace

extern "C" {

// X, the vectors, the plan -> Y, mu, v, mean, var
int rbn_mindspore_forward(int, void **tensors, int *dimensions, int64_t **shapes, const char **dtypes, void *, void *) {
  void **vectors = tensors + 1, **outputs = vectors + VECTORS + 1;
  const double *plan = (const double *)vectors[VECTORS];
  const rbn_layer layer = layer_of(dimensions[0], shapes[0], dtypes[0], plan);
  const rbn_parameters parameters = parameters_of(vectors, plan);
  if (!layer.batch_statistics) {  // the layer's own may have changed until the backward pass
    const size_t size = layer.channels * (layer.dtype == RBN_FLOAT64 ? sizeof(double) : sizeof(float));
    memcpy(outputs[3], parameters.running_mean, size);
    memcpy(outputs[4], parameters.running_var, size);
  }
  return rbn_forward(&layer, &parameters, tensors[0], outputs[0], outputs[1], outputs[2], outputs[3], outputs[4]);
}

// dY, X, mu, v, the vectors, the plan -> the gradients of X and the five parameters
int rbn_mindspore_backward(int, void **tensors, int *dimensions, int64_t **shapes, const char **dtypes, void *, void *) {
  void **vectors = tensors + 4, **outputs = vectors + VECTORS + 1;
  const double *plan = (const double *)vectors[VECTORS];
  const rbn_layer layer = layer_of(dimensions[1], shapes[1], dtypes[1], plan);
  const rbn_parameters parameters = parameters_of(vectors, plan);
  const rbn_gradients gradients = {outputs[1], outputs[2], outputs[3], outputs[4], outputs[5]};
  return rbn_backward(&layer, &parameters, tensors[0], tensors[1], tensors[2], tensors[3], outputs[0], &gradients);
}

// The running mean and variance and the count of batches, all three changed in place, mean, var, the plan -> the count
int rbn_mindspore_accumulate(int, void **tensors, int *, int64_t **shapes, const char **dtypes, void *, void *) {
  const double *plan = (const double *)tensors[5];
  const int32_t count = ++*(int32_t *)tensors[2];
  const double new_weight = plan[NEW_WEIGHT] < 0 ? 1.0 / count : plan[NEW_WEIGHT];
  for (int i = 0; i < 2; i++)
    rbn_accumulate(shapes[i][0], !strcmp(dtypes[i], "float64"), !strcmp(dtypes[3 + i], "float64"), tensors[i],
                   tensors[3 + i], new_weight, i == 1 ? plan[CORRECTION] : 1);
  *(int32_t *)tensors[6] = count;
  return 0;
}

}  // extern "C"
