// All layers of the model for the tokens of one step: gptoss_infer.model.Layer, without Python between the parts.
//
// The residual stream is rounded to T after attention and after the experts; within each, to T where products need it.

#pragma once

#include "attention.h"
#include "experts.h"
#include "linear.h"
#include "rows.h"

namespace gptoss {

struct Shape {
    int64_t num_layers, hidden, heads, kv_heads, head_dim, num_experts, top_k;
    float eps, alpha, limit;
};

struct Layer {
    const float *input_norm, *post_norm;
    Affine q, k, v, o, router;
    const void* sinks;
    Projection gate_up, down;
    void *keys, *values;  // the layer's pools of pages
    int64_t window;       // 0: full
};

// Where the new tokens are and what they see, in the layers of one kind.
struct Pages {
    const int64_t *pages, *first_pages;
    int64_t num_pages;
};

struct Step {
    int64_t num_tokens, page_tokens;
    const int64_t *sequences, *positions;
    const float *cos, *sin;
    Pages full, window;
};

template <class T>
class Runner {
  public:
    Runner(const Shape& shape, const Step& step, int threads)
        : shape_(shape), step_(step), threads_(threads), n_(step.num_tokens), width_(shape.heads * shape.head_dim),
          kv_width_(shape.kv_heads * shape.head_dim), normed_(scratch<T>(n_ * shape.hidden)), q_(scratch<T>(n_ * width_)),
          k_(scratch<T>(n_ * kv_width_)), v_(scratch<T>(n_ * kv_width_)), attended_(scratch<T>(n_ * width_)),
          logits_(scratch<float>(n_ * shape.num_experts)), weights_(scratch<float>(n_ * shape.top_k)),
          chosen_(scratch<int64_t>(n_ * shape.top_k)) {}

    // Takes x (N, C) through a layer, in place.
    void run(const Layer& layer, T* x) {
        const Shape& s = shape_;
        {
            Rows<T> rows = normed(x, layer.input_norm);
            linear<T, T>(rows, n_, s.hidden,
                         {{layer.q, q_.get(), nullptr}, {layer.k, k_.get(), nullptr}, {layer.v, v_.get(), nullptr}}, threads_);
        }
        rotate(q_.get(), step_.cos, step_.sin, n_, s.heads, s.head_dim, threads_);
        rotate(k_.get(), step_.cos, step_.sin, n_, s.kv_heads, s.head_dim, threads_);
        const Pages& pages = layer.window > 0 ? step_.window : step_.full;
        Attention<T>{
            q_.get(), k_.get(), v_.get(), step_.sequences, step_.positions, (T*)layer.keys, (T*)layer.values,
            pages.pages, pages.first_pages, pages.num_pages, step_.page_tokens, (const T*)layer.sinks, n_, s.heads,
            s.kv_heads, s.head_dim, layer.window, attended_.get(), threads_,
        }.run();
        linear<T, T>(Rows<T>(attended_.get(), n_, width_), n_, width_, {{layer.o, x, x}}, threads_);
        Rows<T> rows = normed(x, layer.post_norm);
        linear<T, float>(rows, n_, s.hidden, {{layer.router, logits_.get(), nullptr}}, threads_);
        top_k(logits_.get(), n_, s.num_experts, s.top_k, chosen_.get(), weights_.get());
        Experts<T>{
            chosen_.get(), weights_.get(), n_, s.top_k, s.num_experts, layer.gate_up, layer.down, s.alpha, s.limit, x, x,
            threads_,
        }.run(rows);
    }

  private:
    Rows<T> normed(const T* x, const float* weight) {
        rms_norm(x, weight, shape_.eps, n_, shape_.hidden, normed_.get(), threads_);
        return Rows<T>(normed_.get(), n_, shape_.hidden);
    }

    const Shape& shape_;
    const Step& step_;
    int threads_;
    int64_t n_, width_, kv_width_;
    std::unique_ptr<T[], Free> normed_, q_, k_, v_, attended_;
    std::unique_ptr<float[], Free> logits_, weights_;
    std::unique_ptr<int64_t[], Free> chosen_;
};

}  // namespace gptoss
