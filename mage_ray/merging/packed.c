/* Linears of one input and their experts, for a few rows or many: y_j = W_j x + b_j + B_j (d * (A_j x)), float32.
   On the way in x may get its RMS norm; on the way out a residual may be added.

   The weights lie in panels of WIDTH outputs, [panel][input][WIDTH]: a step of the inner loop loads one line of each of
   a few panels and multiplies it by every row of a block. Each output is one running sum, over the inputs and then over
   the ranks that are added to it, in that order for any number of rows: the result for a row is the same to the last
   bit, whatever its neighbours. Panels are handed out to threads a few at a time, so that a thread that the machine
   holds up doesn't hold up the others.

   M rows of x. A block is a group of rows that is multiplied at a time; its inputs lie beside each other, [input][row]. */

#include <math.h>
#include <stdint.h>

#define WIDTH 16
typedef float line __attribute__((vector_size(4 * WIDTH), aligned(4)));

typedef struct {
    int32_t column, count; /* its first output (or rank), and how many of its WIDTH are real */
    int32_t first, ranks;  /* which ranks are added to it, as numbered in padded panels */
    int64_t up;            /* where their factors [ranks][WIDTH] begin in ups */
} Panel;

typedef struct {
    int32_t inputs, outputs, ranks; /* of x, of y and of d */
    int32_t panels, rank_panels;    /* those of the outputs come first */
    const Panel *panel;
    const float *weights; /* [panels + rank_panels][inputs][WIDTH] */
    const float *biases;  /* [panels][WIDTH], or null */
    const float *ups;
} Group;

/* How many rows a block may have, and over how many panels it then goes at a time: what fits the registers. */
#ifdef __AVX512F__
#define SIZES(X) X(1, 4) X(2, 4) X(3, 4) X(4, 4) X(6, 4) X(8, 3) X(10, 2) X(12, 2) X(16, 1) X(20, 1) X(24, 1)
#define LARGEST 24 /* the most rows that are one block */
#define MANY 8     /* rows of a block where there are more */
#else
#define SIZES(X) X(1, 2) X(2, 2) X(3, 1) X(4, 1) X(5, 1)
#define LARGEST 5
#define MANY 5
#endif

#define AHEAD 1024 /* floats by which memory is asked for ahead of its use */

static inline __attribute__((always_inline)) void multiply(
    const int rows, const int side, const float *x, int64_t count, const float *const *weights, line sum[rows][side])
{
    for (int64_t k = 0; k < count; k++) {
        line weight[4];
#pragma GCC unroll 4
        for (int s = 0; s < side; s++) {
            weight[s] = *(const line *)(weights[s] + k * WIDTH);
            __builtin_prefetch(weights[s] + k * WIDTH + AHEAD);
        }
#pragma GCC unroll 32
        for (int m = 0; m < rows; m++) {
#pragma GCC unroll 4
            for (int s = 0; s < side; s++)
                sum[m][s] += weight[s] * x[k * rows + m];
        }
    }
}

/* One block and the panels from p on; z are its scaled ranks [rank][row], or null. The result is [side][row]. */
#define KERNEL(rows, side)                                                                                             \
    static void block_##rows##_##side(const Group *g, int p, const float *x, const float *z, line *result)             \
    {                                                                                                                  \
        line sum[rows][side];                                                                                          \
        const float *weights[side];                                                                                    \
        _Pragma("GCC unroll 4") for (int s = 0; s < side; s++)                                                         \
        {                                                                                                              \
            line bias = {0};                                                                                           \
            if (g->biases && p + s < g->panels)                                                                        \
                bias = *(const line *)(g->biases + (int64_t)(p + s) * WIDTH);                                          \
            _Pragma("GCC unroll 32") for (int m = 0; m < rows; m++) sum[m][s] = bias;                                  \
            weights[s] = g->weights + (int64_t)(p + s) * g->inputs * WIDTH;                                            \
        }                                                                                                              \
        multiply(rows, side, x, g->inputs, weights, sum);                                                              \
        if (z && g->panel[p].ranks) {                                                                                  \
            _Pragma("GCC unroll 4") for (int s = 0; s < side; s++) weights[s] = g->ups + g->panel[p + s].up;           \
            multiply(rows, side, z + (int64_t)g->panel[p].first * rows, g->panel[p].ranks, weights, sum);              \
        }                                                                                                              \
        _Pragma("GCC unroll 4") for (int s = 0; s < side; s++)                                                         \
            _Pragma("GCC unroll 32") for (int m = 0; m < rows; m++) result[s * rows + m] = sum[m][s];                  \
    }

#define SINGLE_1(rows)
#define SINGLE_2(rows) KERNEL(rows, 1)
#define SINGLE_3(rows) KERNEL(rows, 1)
#define SINGLE_4(rows) KERNEL(rows, 1)
#define KERNELS(rows, side) KERNEL(rows, side) SINGLE_##side(rows)
SIZES(KERNELS)

typedef struct {
    int rows, side;
    void (*several)(const Group *, int, const float *, const float *, line *);
    void (*single)(const Group *, int, const float *, const float *, line *);
} Size;

#define SIZE(rows, side) {rows, side, block_##rows##_##side, block_##rows##_1},
static const Size sizes[] = {SIZES(SIZE)};

static const Size *size_for(int64_t M)
{
    const Size *size = sizes;
    while (size->rows < (M > LARGEST ? MANY : M))
        size++;
    return size;
}

/* How many floats of scratch M rows take. */
int64_t packed_scratch(const Group *g, int64_t M)
{
    const int64_t rows = size_for(M)->rows;
    return (M + rows - 1) / rows * rows * (g->inputs + (int64_t)g->rank_panels * WIDTH);
}

/* What x is multiplied by for its RMS norm, but for the norm's weight. */
static float rms_scale(const float *x, int64_t inputs, float epsilon)
{
    line squares = {0};
    float total = 0;
    int64_t k = 0;
    for (; k + WIDTH <= inputs; k += WIDTH)
        squares += *(const line *)(x + k) * *(const line *)(x + k);
    for (; k < inputs; k++)
        total += x[k] * x[k];
    for (int i = 0; i < WIDTH; i++)
        total += squares[i];
    return 1 / sqrtf(total / inputs + epsilon);
}

/* Inputs begin to end of a block's rows, beside each other, after their norm if there is one. */
static void pack(float *to, const float *x, const float *norm, float epsilon, int64_t first, int64_t rows, int64_t M,
                 int64_t inputs, int64_t begin, int64_t end)
{
    float scale[LARGEST];
    const int64_t real = rows < M - first ? rows : M - first;
    for (int64_t m = 0; m < real; m++)
        scale[m] = norm ? rms_scale(x + (first + m) * inputs, inputs, epsilon) : 1;
    /* A few inputs at a time, so that the lines written to stay at hand. */
    for (int64_t k0 = begin; k0 < end; k0 += WIDTH) {
        const int64_t k1 = k0 + WIDTH < end ? k0 + WIDTH : end;
        for (int64_t m = 0; m < rows; m++) {
            const float *const from = x + (first + m) * inputs;
            if (m >= real)
                for (int64_t k = k0; k < k1; k++)
                    to[k * rows + m] = 0;
            else if (norm)
                for (int64_t k = k0; k < k1; k++)
                    to[k * rows + m] = from[k] * scale[m] * norm[k];
            else
                for (int64_t k = k0; k < k1; k++)
                    to[k * rows + m] = from[k];
        }
    }
}

/* y [M, outputs] from x [M, inputs] and d [M, ranks], null for the linears alone. With a norm [inputs] x is normalised
   first; a residual [M, outputs] is added to the result. Both may be null. */
void packed_multiply(const Group *g, const float *x, const float *d, const float *norm, const float *residual,
                     float *y, float *scratch, float epsilon, int64_t M, int threads)
{
    const Size size = *size_for(M);
    const int64_t rows = size.rows, inputs = g->inputs, ranks = d ? (int64_t)g->rank_panels * WIDTH : 0;
    const int64_t blocks = (M + rows - 1) / rows;
    float *const packed = scratch, *const z = scratch + blocks * rows * inputs;
    /* Few blocks are packed in shares of their inputs: threads that write to the same lines would hold each other up. */
    const int64_t shares = blocks < 4 * threads ? threads : 1;
    /* Some eight turns for each thread, of whole sides. */
    const int turn = size.side * (1 + g->panels / (size.side * threads * 8));

#pragma omp parallel num_threads(threads)
    {
        line result[4 * LARGEST];
#pragma omp for schedule(static)
        for (int64_t share = 0; share < blocks * shares; share++) {
            const int64_t b = share / shares, k0 = share % shares * inputs / shares;
            pack(packed + b * rows * inputs, x, norm, epsilon, b * rows, rows, M, inputs, k0,
                 (share % shares + 1) * inputs / shares);
        }
        if (ranks) {
#pragma omp for schedule(dynamic)
            for (int r = 0; r < g->rank_panels; r++) {
                const Panel panel = g->panel[g->panels + r];
                for (int64_t b = 0; b < blocks; b++) {
                    float *const to = z + (b * ranks + (int64_t)r * WIDTH) * rows;
                    size.single(g, g->panels + r, packed + b * rows * inputs, 0, result);
                    for (int64_t m = 0; m < rows; m++)
                        for (int j = 0; j < WIDTH; j++) {
                            const int64_t row = b * rows + m;
                            const int real = j < panel.count && row < M;
                            to[j * rows + m] = real ? result[m][j] * d[row * g->ranks + panel.column + j] : 0;
                        }
                }
            }
        }
#pragma omp for schedule(dynamic) nowait
        for (int begin = 0; begin < g->panels; begin += turn) {
            const int end = begin + turn < g->panels ? begin + turn : g->panels;
            for (int p = begin, beside; p < end; p += beside) {
                /* Panels that go together add the same ranks. */
                const Panel *const here = g->panel + p, *const last = here + size.side - 1;
                const int alike = p + size.side <= end && here->first == last->first && here->ranks == last->ranks;
                beside = alike ? size.side : 1;
                for (int64_t b = 0; b < blocks; b++) {
                    (alike ? size.several : size.single)(
                        g, p, packed + b * rows * inputs, ranks ? z + b * ranks * rows : 0, result);
                    for (int s = 0; s < beside; s++)
                        for (int64_t m = 0; m < rows && b * rows + m < M; m++) {
                            const int64_t at = (b * rows + m) * g->outputs + g->panel[p + s].column;
                            const int count = g->panel[p + s].count;
                            if (residual)
                                for (int j = 0; j < count; j++)
                                    y[at + j] = result[s * rows + m][j] + residual[at + j];
                            else
                                for (int j = 0; j < count; j++)
                                    y[at + j] = result[s * rows + m][j];
                        }
                }
            }
        }
    }
}
