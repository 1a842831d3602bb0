// What XLA calls on the CPU, through the binary interface of its custom calls (xla/ffi/api/c_api.h). The few parts of
// it that are used are declared here, so that the library is compiled without JAX and runs with any.

#include <omp.h>

#include <cstring>

#include "rbn_kernels.h"

namespace {

struct Extension {
  size_t size;
  int type;
  Extension *next;
};

// Asked for when a function is registered: the version of the interface that it was written for.
const int METADATA = 1;
struct Version {
  size_t size;
  Extension *extensions;
  int major, minor;
};
struct Metadata {
  size_t size;
  Version version;
  uint32_t traits;
};
struct MetadataExtension {
  Extension base;
  Metadata *metadata;
};

struct Buffer {
  size_t size;
  Extension *extensions;
  int dtype;
  void *data;
  int64_t rank, *dimensions;
};
struct Buffers {
  size_t size;
  Extension *extensions;
  int64_t count;
  int *types;
  Buffer **buffers;
};
struct Numbers {
  int dtype;
  size_t count;
  void *data;
};
struct Attributes {
  size_t size;
  Extension *extensions;
  int64_t count;
  int *types;
  void **names;
  Numbers **values;
};
struct Error {
  size_t size;
  Extension *extensions;
  const char *text;
  int kind;
};
const int INVALID_ARGUMENT = 3, RESOURCE_EXHAUSTED = 8;
struct Functions {
  size_t size;
  Extension *extensions;
  Version version;
  const void *internal;
  void *(*create_error)(Error *);
};
struct Call {
  size_t size;
  Extension *extensions;
  const Functions *functions;
  void *context;
  int stage;
  Buffers inputs, outputs;
  Attributes attributes;
};

bool is_registration(const Call *call) {
  if (!call->extensions || call->extensions->type != METADATA) return false;
  Metadata *metadata = ((MetadataExtension *)call->extensions)->metadata;
  metadata->version.major = 0;
  metadata->version.minor = 1;
  metadata->traits = 0;
  return true;
}

// What a call returns: nothing if all is well.
void *result_of(const Call *call, int result, const char *refusal) {
  if (result == RBN_DONE) return nullptr;
  Error error = {sizeof error, nullptr, "RBN: no memory for the numbers of the planes", RESOURCE_EXHAUSTED};
  if (result == RBN_DOES_NOT_FIT) error = {sizeof error, nullptr, refusal, INVALID_ARGUMENT};
  return call->functions->create_error(&error);
}

rbn_array array_of(const Buffer *buffer) {
  rbn_array array = {buffer->data, 1, -1};
  for (int64_t i = 0; i < buffer->rank; i++) array.count *= buffer->dimensions[i];
  switch (buffer->dtype) {
    case 11: array.dtype = RBN_FLOAT32; break;
    case 12: array.dtype = RBN_FLOAT64; break;
    case 10: array.dtype = RBN_FLOAT16; break;
    case 16: array.dtype = RBN_BFLOAT16; break;
  }
  return array;
}

// gamma, beta, center_weight, scale_weight, scale_bias, running mean and variance.
const int VECTORS = 7;

// The call's one attribute: a bit for each of the vectors that is an input, and the bytes of the layer.
struct Plan {
  int64_t present;
  rbn_layer layer;
};

// The plan of a call of `images` arrays, the vectors, and so many outputs; false where it is another's.
bool read_plan(const Call *call, int64_t images, int64_t outputs, Plan &plan) {
  if (call->attributes.count != 1 || call->attributes.values[0]->count * sizeof(int64_t) != sizeof plan) return false;
  memcpy(&plan, call->attributes.values[0]->data, sizeof plan);
  rbn_layer &layer = plan.layer;
  layer.threads = rbn_worthwhile_threads(layer.images, layer.channels, layer.positions, omp_get_max_threads());
  const int64_t vectors = __builtin_popcountll(plan.present & ((1 << VECTORS) - 1));
  return call->inputs.count == images + vectors && call->outputs.count == outputs;
}

const char *const OF_ANOTHER_VERSION = "RBN: the call is not one of this version of the loops. Install rbn again.";

// From the input `next` on.
rbn_parameters parameters_of(const Call *call, const Plan &plan, int next) {
  rbn_array all[VECTORS] = {};
  for (int i = 0; i < VECTORS; i++)
    if (plan.present >> i & 1) all[i] = array_of(call->inputs.buffers[next++]);
  return {all[0], all[1], all[2], all[3], all[4], all[5], all[6]};
}

}  // namespace

extern "C" {

// X, the vectors -> Y, mu, v, mean, var
void *rbn_xla_forward(Call *call) {
  if (is_registration(call)) return nullptr;
  Plan plan;
  if (!read_plan(call, 1, 5, plan)) return result_of(call, RBN_DOES_NOT_FIT, OF_ANOTHER_VERSION);
  const auto in = [&](int i) { return array_of(call->inputs.buffers[i]); };
  const auto out = [&](int i) { return array_of(call->outputs.buffers[i]); };
  const rbn_forward_arrays arrays = {in(0), out(0), out(1), out(2), out(3), out(4), parameters_of(call, plan, 1)};
  return result_of(call, rbn_forward(&plan.layer, &arrays), rbn_refusal());
}

// dY, X, mu, v, the vectors -> the gradients of X and of the five parameters
void *rbn_xla_backward(Call *call) {
  if (is_registration(call)) return nullptr;
  Plan plan;
  if (!read_plan(call, 4, 6, plan)) return result_of(call, RBN_DOES_NOT_FIT, OF_ANOTHER_VERSION);
  const auto in = [&](int i) { return array_of(call->inputs.buffers[i]); };
  const auto out = [&](int i) { return array_of(call->outputs.buffers[i]); };
  const rbn_backward_arrays arrays = {in(0), in(1), in(2), in(3), out(0), parameters_of(call, plan, 4),
                                      {out(1), out(2), out(3), out(4), out(5)}};
  return result_of(call, rbn_backward(&plan.layer, &arrays), rbn_refusal());
}

}  // extern "C"
