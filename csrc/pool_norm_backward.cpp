// Traffic: the gradient and the saved row of each cell are read once, and the gradient of each patch is
// written once. The patches are walked row by row; the gradients of the pooled cells over the current
// row are held in the cache, as sums.
//
// The batch is cut into bands of patches, by its size alone. A cell over two bands is computed in both;
// the gradients of scale and shift have one partial sum a band, in which a cell counts where its window
// begins, and the partial sums are added up in order.
#include <algorithm>
#include <memory>

#include "pool_norm.h"
#include "pool_walk.h"
#include "threads.h"

namespace tokenflex {
namespace {

constexpr int64_t kBandPatches = 128;  // at least
constexpr int64_t kMostBands = 64;

// A power of 2, which most numbers of threads divide evenly.
int64_t num_bands(int64_t patches) {
  int64_t bands = 1;
  while (bands < kMostBands && patches >= 2 * bands * kBandPatches) bands *= 2;
  return bands;
}

// The rows of cells that lie over one row of patches, at most.
int64_t rows_over(const Image& image) {
  int64_t most = 0;
  for (int64_t r = 0; r < image.in_h; ++r) {
    most = std::max<int64_t>(most, image.covers_h[r].count);
  }
  return most;
}

// U is the type of the patches' gradient, whose sums are of the type that those of T are of.
template <class T, class U>
class Backward {
 public:
  Backward(const PoolNormBackward& job)
      : job_(job), scale_(widened_vector<Sum>(job.weight, job.width)) {}

  void run(int threads) const {
    const PoolTables& tables = job_.tables;
    const int64_t width = job_.width, patches = tables.num_patches;
    const int64_t bands = num_bands(patches);
    const int64_t bytes = patches * width * int64_t(sizeof(U));
    const int64_t parts = worthwhile_parts(bands, bytes, threads);
    const int64_t scratch_rows = job_.grad_x ? most_held_cells() + 2 : 0;
    const std::unique_ptr<Sum[]> scratch(new Sum[size_t(parts * scratch_rows * width)]);
    std::vector<Sum> partials(static_cast<size_t>(job_.grad_scale ? bands * 2 * width : 0));
    in_parts(parts, parts, [&](int64_t begin, int64_t end) {
      Sum* rows = scratch.get() + begin * scratch_rows * width;
      for (int64_t band = bands * begin / parts; band < bands * end / parts; ++band) {
        Sum* scale_grad = job_.grad_scale ? partials.data() + band * 2 * width : nullptr;
        Sum* shift_grad = scale_grad + (job_.grad_scale ? width : 0);
        const Part part = part_of(tables, band, bands);
        for_images(tables, part, [&](const Image& image) {
          if (scale_grad) add_cells(image, part, scale_grad, shift_grad);
          if (job_.grad_x) gather(image, part, rows);
        });
      }
    });
    if (job_.grad_scale) add_up(partials, bands);
  }

 private:
  using Sum = SumOf<T>;

  int64_t most_held_cells() const {
    int64_t most = 0;
    for (int64_t index = 0; index < job_.tables.num_images; ++index) {
      const Image image = image_of(job_.tables, index);
      most = std::max(most, rows_over(image) * image.out_w);
    }
    return most;
  }

  const T* grad_row(int64_t cell) const { return reinterpret_cast<const T*>(job_.grad.row(cell)); }

  const T* normalised_row(int64_t cell) const {
    return static_cast<const T*>(job_.normalised) + cell * job_.width;
  }

  void add_cells(const Image& image, Part part, Sum* scale_grad, Sum* shift_grad) const {
    for (int64_t i = 0; i < image.out_h; ++i) {
      if (!part.holds(image.patch(image.windows_h[i].first, 0))) continue;
      for (int64_t j = 0; j < image.out_w; ++j) {
        const int64_t cell = image.cell(i, j);
        add_scale_gradient(grad_row(cell), normalised_row(cell), scale_grad, shift_grad,
                           job_.width);
      }
    }
  }

  void add_up(const std::vector<Sum>& partials, int64_t bands) const {
    const int64_t width = job_.width;
    Sum* totals[2] = {static_cast<Sum*>(job_.grad_scale), static_cast<Sum*>(job_.grad_shift)};
    for (int which = 0; which < 2; ++which) {
      std::fill_n(totals[which], width, Sum(0));
      for (int64_t band = 0; band < bands; ++band) {
        const Sum* partial = partials.data() + (2 * band + which) * width;
        for (int64_t k = 0; k < width; ++k) totals[which][k] += partial[k];
      }
    }
  }

  // The gradient of a pooled cell, over the area of its window.
  void cell_gradient(const Image& image, int64_t i, int64_t j, Sum* grad, Sum* scratch) const {
    const int64_t cell = image.cell(i, j);
    const Sum area = Sum(int64_t(image.windows_h[i].divisor) * image.windows_w[j].divisor);
    if (!job_.weight.data) return average_gradient(grad_row(cell), area, grad, job_.width);
    const Sum inverse_std = static_cast<const Sum*>(job_.inverse_std)[cell];
    norm_gradient(grad_row(cell), normalised_row(cell), scale_.data(), inverse_std / area, grad,
                  scratch, job_.width);
  }

  // `rows` has room for the cells over a row of patches, and two further rows.
  void gather(const Image& image, Part part, Sum* rows) const {
    const int64_t width = job_.width;
    Sum *sums = rows, *scratch = rows + width, *held = rows + 2 * width;
    const int64_t slots = rows_over(image);
    const auto held_row = [&](int64_t i, int64_t j) {
      return held + (i % slots * image.out_w + j) * width;
    };
    int64_t next = 0;  // the first row of cells that is not held yet
    for (int64_t r = 0; r < image.in_h; ++r) {
      if (!part.holds(image.patch(r, 0))) continue;
      const Cover& over = image.covers_h[r];
      for (next = std::max<int64_t>(next, over.first); next < over.end(); ++next) {
        for (int64_t j = 0; j < image.out_w; ++j) {
          cell_gradient(image, next, j, held_row(next, j), scratch);
        }
      }
      for (int64_t c = 0; c < image.in_w; ++c) gather_patch(image, r, c, held_row, sums);
    }
  }

  template <class HeldRow>
  void gather_patch(const Image& image, int64_t r, int64_t c, const HeldRow& held_row,
                    Sum* sums) const {
    const double* weights = job_.tables.weights;
    const Cover &rows = image.covers_h[r], &columns = image.covers_w[c];
    U* out = static_cast<U*>(job_.grad_x) + image.patch(r, c) * job_.width;
    RowCollector<Sum> cells(job_.tables.weighted);
    bool adds = false;
    const auto sum_up = [&](const RowSum<Sum>& some) {
      add_rows(some, adds, sums, job_.width);
      adds = true;
    };
    for (int64_t i = rows.first; i < rows.end(); ++i) {
      const Window& window_h = image.windows_h[i];
      const double weight_h = weights[window_h.weights + r - window_h.first];
      for (int64_t j = columns.first; j < columns.end(); ++j) {
        const Window& window_w = image.windows_w[j];
        const double weight_w = weights[window_w.weights + c - window_w.first];
        cells.add(held_row(i, j), Sum(weight_h * weight_w), sum_up);
      }
    }
    if (cells.rest().count == 0) {
      std::fill_n(out, job_.width, U{});
    } else if (adds) {
      sum_up(cells.rest());
      write_rows(RowSum<Sum>{{sums}, {}, 1, false}, out, job_.width);
    } else {
      write_rows(cells.rest(), out, job_.width);
    }
  }

  const PoolNormBackward& job_;
  std::vector<Sum> scale_;
};

}  // namespace

void pool_norm_backward(const PoolNormBackward& job, int threads) {
  with_dtype(job.dtype, [&](auto element) {
    using T = decltype(element);
    with_dtype_of_sums<SumOf<T>>(job.grad_x_dtype, [&](auto x_element) {
      Backward<T, decltype(x_element)>(job).run(threads);
    });
  });
}

}  // namespace tokenflex
