// Says when a parameter's gradient is complete in a backward pass: a hook on the node that accumulates it, as PyTorch's
// DistributedDataParallel has (torch/csrc/distributed/c10d/reducer.cpp). tch has no function for this.

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <cstddef>
#include <cstdio>
#include <exception>
#include <memory>

namespace {

using torch::autograd::Node;
using torch::autograd::variable_list;

/// One reference of the Rust side's context: `forget` gives it back.
struct Context {
  const void *pointer;
  void (*ready)(const void *, std::size_t);
  void (*forget)(const void *);

  Context(const void *pointer, void (*ready)(const void *, std::size_t), void (*forget)(const void *))
      : pointer(pointer), ready(ready), forget(forget) {}
  Context(const Context &) = delete;
  Context &operator=(const Context &) = delete;
  ~Context() { forget(pointer); }
};

class Hook final : public torch::autograd::FunctionPostHook {
 public:
  Hook(std::unique_ptr<Context> context, std::size_t parameter) : context(std::move(context)), parameter(parameter) {}

  variable_list operator()(const variable_list &outputs, const variable_list &) override {
    context->ready(context->pointer, parameter);
    return outputs;
  }

 private:
  std::unique_ptr<Context> context;
  std::size_t parameter;
};

}  // namespace

/// Has `ready(context, parameter)` called in each backward pass, when the gradient of this leaf is complete, on the
/// pass's thread. Takes over one reference of `context` in any case.
///
/// Returns the node, which has the hook as long as it is kept; or null, with a reason of at most `room` bytes.
extern "C" std::shared_ptr<Node> *paceline_hook_add(const at::Tensor *tensor, const void *context,
                                                    void (*ready)(const void *, std::size_t),
                                                    void (*forget)(const void *), std::size_t parameter, char *reason,
                                                    std::size_t room) noexcept {
  std::unique_ptr<Context> owned;
  try {
    owned = std::make_unique<Context>(context, ready, forget);
  } catch (...) {
    forget(context);
    std::snprintf(reason, room, "there is no memory left");
    return nullptr;
  }
  try {
    auto node = std::make_unique<std::shared_ptr<Node>>(torch::autograd::impl::grad_accumulator(*tensor));
    if (!*node) {
      std::snprintf(reason, room, "it is not a leaf that requires a gradient");
      return nullptr;
    }
    (*node)->add_post_hook(std::make_unique<Hook>(std::move(owned), parameter));
    return node.release();
  } catch (const std::exception &error) {
    std::snprintf(reason, room, "%s", error.what());
  } catch (...) {
    std::snprintf(reason, room, "an exception of an unknown kind");
  }
  return nullptr;
}

/// Gives the node up, and with it the hook, unless a graph or another hook's owner still has it: then it is called on,
/// to no effect. Taking it out of the node here could meet a pass that runs through it.
extern "C" void paceline_hook_free(std::shared_ptr<Node> *node) noexcept { delete node; }
