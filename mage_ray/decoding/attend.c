/* Attention of a few new tokens over KV slots, float32: rotate, write keys and values, look back.

   B rows, T new tokens of each, H query heads, G key-value heads, D head size (a multiple of WIDTH), L positions.
   A slot is [position][G][D]; position l of row b lies at start[b] + l. A token looks at positions 0 to its own. */

#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#define WIDTH 16
#define LARGEST 256 /* of D */
typedef float line __attribute__((vector_size(4 * WIDTH), aligned(4)));

static inline float dot(const float *a, const float *b, int D)
{
    line sum = {0};
    for (int i = 0; i < D; i += WIDTH)
        sum += *(const line *)(a + i) * *(const line *)(b + i);
    float total = 0;
    for (int i = 0; i < WIDTH; i++)
        total += sum[i];
    return total;
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
   write[n] of the whole cache. Scratch: threads * longest floats. */
void attend(const float *qkv, const float *cosine, const float *sine, float *keys, float *values, const int64_t *start,
            const int64_t *position, const int64_t *write, float *seen, float *scratch, int64_t B, int64_t T, int H,
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
                    const int64_t count = position[n] + 1;
                    float query[LARGEST], largest = -INFINITY, total = 0;
                    rotate(query, qkv + n * width + (int64_t)h * D, cosine + n * D, sine + n * D, D, scale);
                    for (int64_t l = 0; l < count; l++) {
                        weight[l] = dot(query, own_keys + l * step, D);
                        largest = weight[l] > largest ? weight[l] : largest;
                    }
                    line sum[LARGEST / WIDTH] = {{0}};
                    for (int64_t l = 0; l < count; l++) {
                        const float w = expf(weight[l] - largest);
                        total += w;
                        for (int i = 0; i < D / WIDTH; i++)
                            sum[i] += w * *(const line *)(own_values + l * step + i * WIDTH);
                    }
                    line *const to = (line *)(seen + (n * H + h) * D);
                    for (int i = 0; i < D / WIDTH; i++)
                        to[i] = sum[i] / total;
                }
        }
}
