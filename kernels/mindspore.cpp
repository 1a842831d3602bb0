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

enum accumulation { NEW_WEIGHT, CORRECTION, WEIGHTS };

// What an operator gets: its inputs and then its outputs.
struct Call {
  int count;
  void **tensors;
  int *dimensions;
  int64_t **shapes;
  const char **dtypes;

  int64_t values(int i) const {
    int64_t product = 1;
    for (int axis = 0; axis < dimensions[i]; axis++) product *= shapes[i][axis];
    return product;
  }
  bool is(int i, const char *dtype, int64_t count) const { return !strcmp(dtypes[i], dtype) && values(i) == count; }
  rbn_array array(int i) const {
    const int64_t dtype = !strcmp(dtypes[i], "float32")    ? RBN_FLOAT32
                          : !strcmp(dtypes[i], "float64")  ? RBN_FLOAT64
                          : !strcmp(dtypes[i], "float16")  ? RBN_FLOAT16
                          : !strcmp(dtypes[i], "bfloat16") ? RBN_BFLOAT16
                                                           : -1;
    return {tensors[i], values(i), dtype};
  }
};

// Of the image that is input i, which has two axes or more.
rbn_layer layer_of(const Call &call, int i, const double *plan) {
  rbn_layer layer = {};
  layer.channels_last = plan[CHANNELS_LAST] != 0;
  const int axis = layer.channels_last ? call.dimensions[i] - 1 : 1;
  layer.images = call.shapes[i][0];
  layer.channels = call.shapes[i][axis];
  layer.positions = 1;
  for (int other = 1; other < call.dimensions[i]; other++)
    if (other != axis) layer.positions *= call.shapes[i][other];
  layer.dtype = (int32_t)call.array(i).dtype;
  layer.centering = (int32_t)plan[CENTERING];
  layer.scaling = (int32_t)plan[SCALING];
  layer.restriction = (int32_t)plan[RESTRICTION];
  layer.batch_statistics = plan[SIZE - 1] == 0;
  layer.eps = plan[EPS];
  const int asked = (int)plan[THREADS], there = omp_get_max_threads(), most = asked < there ? asked : there;
  layer.threads = rbn_worthwhile_threads(layer.images, layer.channels, layer.positions, most);
  return layer;
}

// The vectors are the inputs from `first` on, and the plan is behind them.
rbn_parameters parameters_of(const Call &call, int first, const double *plan) {
  const auto one = [&](int i) { return plan[PRESENT + i] ? call.array(first + i) : rbn_array{}; };
  return {one(0), one(1), one(2), one(3), one(4), one(5), one(6)};
}

}  // namespace

extern "C" {

// X, the vectors, the plan -> Y, mu, v, mean, var
int rbn_mindspore_forward(int count, void **tensors, int *dimensions, int64_t **shapes, const char **dtypes, void *,
                          void *) {
  const Call call = {count, tensors, dimensions, shapes, dtypes};
  const int numbers = 1 + VECTORS, out = numbers + 1;
  if (count != out + 5 || dimensions[0] < 2 || !call.is(numbers, "int64", SIZE)) return RBN_DOES_NOT_FIT;
  const double *plan = (const double *)tensors[numbers];
  const rbn_layer layer = layer_of(call, 0, plan);
  const rbn_forward_arrays arrays = {call.array(0),       call.array(out),     call.array(out + 1), call.array(out + 2),
                                     call.array(out + 3), call.array(out + 4), parameters_of(call, 1, plan)};
  const int result = rbn_forward(&layer, &arrays);
  if (result == RBN_DONE && !layer.batch_statistics) {  // the layer's own may have changed until the backward pass
    const size_t size = layer.channels * (layer.dtype == RBN_FLOAT64 ? sizeof(double) : sizeof(float));
    memcpy(arrays.mean.values, arrays.parameters.running_mean.values, size);
    memcpy(arrays.var.values, arrays.parameters.running_var.values, size);
  }
  return result;
}

// dY, X, mu, v, the vectors, the plan -> the gradients of X and the five parameters
int rbn_mindspore_backward(int count, void **tensors, int *dimensions, int64_t **shapes, const char **dtypes, void *,
                           void *) {
  const Call call = {count, tensors, dimensions, shapes, dtypes};
  const int numbers = 4 + VECTORS, out = numbers + 1;
  if (count != out + 6 || dimensions[1] < 2 || !call.is(numbers, "int64", SIZE)) return RBN_DOES_NOT_FIT;
  const double *plan = (const double *)tensors[numbers];
  const rbn_layer layer = layer_of(call, 1, plan);
  const rbn_backward_arrays arrays = {
      call.array(0),   call.array(1),
      call.array(2),   call.array(3),
      call.array(out), parameters_of(call, 4, plan),
      {call.array(out + 1), call.array(out + 2), call.array(out + 3), call.array(out + 4), call.array(out + 5)}};
  return rbn_backward(&layer, &arrays);
}

// The running mean and variance and the count of batches, all three changed in place, mean, var, the plan -> the count
int rbn_mindspore_accumulate(int count, void **tensors, int *dimensions, int64_t **shapes, const char **dtypes, void *,
                             void *) {
  const Call call = {count, tensors, dimensions, shapes, dtypes};
  if (count != 7 || !call.is(2, "int32", 1) || !call.is(5, "int64", WEIGHTS) || !call.is(6, "int32", 1))
    return RBN_DOES_NOT_FIT;
  const double *plan = (const double *)tensors[5];
  const int32_t batches = *(int32_t *)tensors[2] + 1;
  const rbn_statistics statistics = {call.array(0), call.array(1), call.array(3), call.array(4)};
  const double new_weight = plan[NEW_WEIGHT] < 0 ? 1.0 / batches : plan[NEW_WEIGHT];
  const int result = rbn_accumulate(&statistics, new_weight, plan[CORRECTION]);
  if (result == RBN_DONE) *(int32_t *)tensors[2] = *(int32_t *)tensors[6] = batches;
  return result;
}

}  // extern "C"
