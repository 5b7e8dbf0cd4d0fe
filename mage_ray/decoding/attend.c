/* Attention of a few new tokens over KV slots, float32: rotate, write keys and values, look back.

   B rows, T new tokens of each, H query heads, G key-value heads, D head size (a multiple of WIDTH), L positions.
   A slot is [position][G][D]; position l of row b lies at start[b] + l. Token n looks at the first sees[n] positions of
   its slot, and at itself, wherever it was written. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define WIDTH 16
#define LARGEST 256 /* of D */
typedef float line __attribute__((vector_size(4 * WIDTH), aligned(4)));

typedef int32_t whole __attribute__((vector_size(4 * WIDTH)));
#define INLINE static inline __attribute__((always_inline))

INLINE float total_of(line sum)
{
    /* In halves: one number after the other would take longer than all the products. */
    float part[WIDTH];
    memcpy(part, &sum, sizeof part);
    for (int i = 0; i < 8; i++)
        part[i] += part[i + 8];
    for (int i = 0; i < 4; i++)
        part[i] += part[i + 4];
    return (part[0] + part[2]) + (part[1] + part[3]);
}

/* e^x for x <= 0 to float's precision: 2^n times a polynomial in what is left (Cephes' coefficients). */
INLINE line exponential(line x)
{
    const whole low = x < -87.0f;
    x = (line)(((whole)x & ~low) | ((whole)((line){0} - 87.0f) & low));
    const whole n = __builtin_convertvector(x * 1.44269504f - 0.5f, whole);
    const line count = __builtin_convertvector(n, line), r = x - count * 0.693359375f + count * 2.12194440e-4f;
    line p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * (line)((n + 127) << 23);
}

/* What one query sees of count places, the last of which is own where it isn't among the first sees. */
INLINE void look_back(const int lines, const float *query, const float *keys, const float *values, int64_t step,
                      int64_t sees, int64_t count, int64_t own, float *weight, float *seen)
{
    float largest = -INFINITY;
    for (int64_t l = 0; l < count; l++) {
        const float *const key = keys + (l < sees ? l : own) * step;
        line sum = {0};
        for (int i = 0; i < lines; i++)
            sum += *(const line *)(query + i * WIDTH) * *(const line *)(key + i * WIDTH);
        weight[l] = total_of(sum);
        largest = weight[l] > largest ? weight[l] : largest;
    }
    for (int64_t l = count; l % WIDTH; l++)
        weight[l] = -INFINITY;
    line totals = {0}, sum[LARGEST / WIDTH] = {{0}};
    for (int64_t l = 0; l < count; l += WIDTH) {
        const line w = exponential(*(const line *)(weight + l) - largest);
        *(line *)(weight + l) = w;
        totals += w;
    }
    for (int64_t l = 0; l < count; l++) {
        const float *const value = values + (l < sees ? l : own) * step;
        for (int i = 0; i < lines; i++)
            sum[i] += weight[l] * *(const line *)(value + i * WIDTH);
    }
    const float total = total_of(totals);
    for (int i = 0; i < lines; i++)
        *(line *)(seen + i * WIDTH) = sum[i] / total;
}

/* Rotary positions: the halves of a head are the two coordinates of D / 2 planes. */
static inline void rotate(float *to, const float *from, const float *cosine, const float *sine, int D, float scale)
{
    for (int i = 0, j = D / 2; j < D; i++, j++) {
        const float a = from[i], b = from[j];
        to[i] = (a * cosine[i] - b * sine[i]) * scale;
        to[j] = (b * cosine[j] + a * sine[j]) * scale;
    }
}

/* seen [B, T, H, D] from qkv [B, T, H + 2 G, D], cosine and sine [B, T, D]. Token n's key and value go to position
   write[n] of the whole cache. Scratch: threads * longest floats, where longest is a multiple of WIDTH. */
void attend(const float *qkv, const float *cosine, const float *sine, float *keys, float *values, const int64_t *start,
            const int64_t *sees, const int64_t *write, float *seen, float *scratch, int64_t B, int64_t T, int H,
            int G, int D, int64_t longest, float scale, int threads)
{
    const int64_t step = (int64_t)G * D, width = (int64_t)(H + 2 * G) * D;
    const int heads = H / G;

#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
    for (int64_t b = 0; b < B; b++)
        for (int g = 0; g < G; g++) {
            float *const weight = scratch + omp_get_thread_num() * longest;
            for (int64_t n = b * T; n < b * T + T; n++) {
                const float *const key = qkv + n * width + (int64_t)(H + g) * D;
                rotate(keys + write[n] * step + g * D, key, cosine + n * D, sine + n * D, D, 1);
                memcpy(values + write[n] * step + g * D, key + step, sizeof(float) * D);
            }
            const float *const own_keys = keys + start[b] * step + g * D;
            const float *const own_values = values + start[b] * step + g * D;
            for (int64_t n = b * T; n < b * T + T; n++)
                for (int h = g * heads; h < (g + 1) * heads; h++) {
                    float query[LARGEST], *const to = seen + (n * H + h) * D;
                    const int64_t own = write[n] - start[b], count = sees[n] + (own >= sees[n]);
                    rotate(query, qkv + n * width + (int64_t)h * D, cosine + n * D, sine + n * D, D, scale);
                    /* The usual sizes by themselves, so that sums stay in registers. */
                    if (D == 64)
                        look_back(4, query, own_keys, own_values, step, sees[n], count, own, weight, to);
                    else if (D == 128)
                        look_back(8, query, own_keys, own_values, step, sees[n], count, own, weight, to);
                    else
                        look_back(D / WIDTH, query, own_keys, own_values, step, sees[n], count, own, weight, to);
                }
        }
}
