// What XLA calls on the CPU, through the binary interface of its custom calls (xla/ffi/api/c_api.h). The few parts of
// it that are used are declared here, so that the library is compiled without JAX and runs with any.

#include <omp.h>

#include <cstring>
#include <new>

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
struct Call {
  size_t size;
  Extension *extensions;
  const void *functions;
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

// gamma, beta, center_weight, scale_weight, scale_bias, running mean and variance.
const int VECTORS = 7;

// The call's one attribute: a bit for each of the vectors that is an input, and the bytes of the layer.
struct Plan {
  int64_t present;
  rbn_layer layer;
};

Plan plan_of(const Call *call) {
  Plan plan;
  memcpy(&plan, call->attributes.values[0]->data, sizeof plan);
  rbn_layer &layer = plan.layer;
  layer.threads = rbn_worthwhile_threads(layer.images, layer.channels, layer.positions, omp_get_max_threads());
  return plan;
}

// From the input `next` on.
rbn_parameters parameters_of(const Call *call, const Plan &plan, int next) {
  const void *all[VECTORS];
  for (int i = 0; i < VECTORS; i++)
    all[i] = plan.present >> i & 1 ? call->inputs.buffers[next++]->data : nullptr;
  return {all[0], all[1], all[2], all[3], all[4], all[5], all[6]};
}

}  // namespace

extern "C" {

// X, the vectors -> Y, mu, v, mean, var
void *rbn_xla_forward(Call *call) {
  if (is_registration(call)) return nullptr;
  const Plan plan = plan_of(call);
  const rbn_parameters parameters = parameters_of(call, plan, 1);
  Buffer **in = call->inputs.buffers, **out = call->outputs.buffers;
  if (rbn_forward(&plan.layer, &parameters, in[0]->data, out[0]->data, out[1]->data, out[2]->data, out[3]->data,
                  out[4]->data))
    throw std::bad_alloc();
  return nullptr;
}

// dY, X, mu, v, the vectors -> the gradients of X and of the five parameters
void *rbn_xla_backward(Call *call) {
  if (is_registration(call)) return nullptr;
  const Plan plan = plan_of(call);
  const rbn_parameters parameters = parameters_of(call, plan, 4);
  Buffer **in = call->inputs.buffers, **out = call->outputs.buffers;
  const rbn_gradients gradients = {out[1]->data, out[2]->data, out[3]->data, out[4]->data, out[5]->data};
  if (rbn_backward(&plan.layer, &parameters, in[0]->data, in[1]->data, in[2]->data, in[3]->data, out[0]->data,
                   &gradients))
    throw std::bad_alloc();
  return nullptr;
}

}  // extern "C"
