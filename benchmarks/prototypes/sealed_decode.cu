// Prototype of decode attention over sealed pages on Hopper, head size 128, G <= 8; see README.md here.
#include <cuda_fp16.h>

#include <cstdint>
// One page-head: 128 tokens, D = 128 dims, N = 16 * NK columns of 2-bit K codes.
constexpr int NK = 8, D = 128;
constexpr int KC = 0, CS = KC + NK * 512, CF = CS + NK * 32, OF = CF + 512, RS = OF + 256, VC = RS + 16,
              VS = VC + 4096, VZ = VS + 256, REC = VZ + 256;
__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ uint32_t movm(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
__device__ __forceinline__ uint32_t h2(float a, float b) {
  __half2 h = __floats2half2_rn(a, b);
  return *reinterpret_cast<uint32_t*>(&h);
}
__device__ __forceinline__ uint32_t hmul2(uint32_t a, uint32_t b) {
  __half2 r = __hmul2(*(__half2*)&a, *(__half2*)&b);
  return *(uint32_t*)&r;
}
__device__ __forceinline__ uint32_t hsub2(uint32_t a, uint32_t b) {
  __half2 r = __hsub2(*(__half2*)&a, *(__half2*)&b);
  return *(uint32_t*)&r;
}
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ uint4 ldg(const void* p) {
  uint4 r;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
               : "l"(p));
  return r;
}

// acc[mt] += tile of 2-bit codes (a lane's 16 bytes) times b0,b1; rows of tile pair f = 2*(mt&1)+rh carry 4^f
// * 2^-24
__device__ __forceinline__ void tile(float (&acc)[8][4], uint4 w4, uint32_t b0, uint32_t b1) {
  uint32_t w[4] = {w4.x, w4.y, w4.z, w4.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t lo = w[i], hi = w[i] >> 8;
    mma(acc[2 * i], lo & 0x00030003u, lo & 0x000C000Cu, hi & 0x00030003u, hi & 0x000C000Cu, b0, b1);
    mma(acc[2 * i + 1], lo & 0x00300030u, lo & 0x00C000C0u, hi & 0x00300030u, hi & 0x00C000C0u, b0, b1);
  }
}
__device__ __forceinline__ float fscale(int mt, int rh) {
  return 16777216.f * ((mt & 1) ? (rh ? 0.015625f : 0.0625f) : (rh ? 0.25f : 1.f));
}

extern "C" __global__ void __launch_bounds__(128)
    decode(const __half* __restrict__ q, const uint8_t* __restrict__ pages, const int* __restrict__ table,
           const int* __restrict__ num_pages, const uint4* __restrict__ basis,
           const __half* __restrict__ qcol, float* __restrict__ out, float* __restrict__ lse,
           int table_stride, int H, long page_bytes, int splits) {
  __shared__ uint4 sE[8 * 32];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  for (int i = threadIdx.x; i < 256; i += 128) sE[i] = basis[i];
  __syncthreads();
  const int h = blockIdx.y, b = blockIdx.z, split = blockIdx.x * 4 + warp;
  const int n = num_pages[b], per = (n + splits - 1) / splits, lo = split * per, hi = min(lo + per, n);
  // q for columns (gathered by the recipe) and for dims, as B fragments; rows >= 4 are zero
  uint32_t qc[NK][2], qd[8][2];
#pragma unroll
  for (int k = 0; k < NK; k++) {
    const uint32_t* p = (const uint32_t*)(qcol + ((long)(b * H + h) * 4 + g) * NK * 16 + k * 16);
    qc[k][0] = g < 4 ? p[t] : 0;
    qc[k][1] = g < 4 ? p[t + 4] : 0;
  }
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const uint32_t* p = (const uint32_t*)(q + ((long)(b * H + h) * 4 + g) * D + k * 16);
    qd[k][0] = g < 4 ? p[t] : 0;
    qd[k][1] = g < 4 ? p[t + 4] : 0;
  }
  float o[8][4] = {}, m0 = -1e30f, m1 = -1e30f, l0 = 0, l1 = 0, z0 = 0, z1 = 0;
  const int* row = table + (long)b * table_stride;
  uint4 kw[NK], vw[8];
  const uint8_t* rec = nullptr;
  if (lo < hi) {
    rec = pages + (long)row[lo] * page_bytes + (long)h * REC;
#pragma unroll
    for (int k = 0; k < NK; k++) kw[k] = ldg(rec + KC + k * 512 + lane * 16);
  }
  for (int p = lo; p < hi; p++) {
    uint4 cs[NK / 2], cf[2], of[4];
#pragma unroll
    for (int i = 0; i < NK / 2; i++) cs[i] = ldg(rec + CS + t * NK * 8 + i * 16);
    if (g < 4) {
      cf[0] = ldg(rec + CF + g * 128 + t * 32);
      cf[1] = ldg(rec + CF + g * 128 + t * 32 + 16);
    }
    if (g == 4) {
#pragma unroll
      for (int i = 0; i < 4; i++) of[i] = ldg(rec + OF + t * 64 + i * 16);
    }
    float rs = g < 4 ? __half2float(*(const __half*)(rec + RS + g * 2)) : 1.f;
#pragma unroll
    for (int k = 0; k < 8; k++) vw[k] = ldg(rec + VC + k * 512 + lane * 16);
    float s[8][4] = {};
    {
      const uint32_t* c = (const uint32_t*)cs;
#pragma unroll
      for (int k = 0; k < NK; k++) tile(s, kw[k], hmul2(qc[k][0], c[2 * k]), hmul2(qc[k][1], c[2 * k + 1]));
    }
    // coefficients and offset times q: rows 0..3 and 4 of one 16-row tile
    float a[4] = {};
    {
      const uint32_t* cb = (const uint32_t*)cf;
      const uint32_t* ob = (const uint32_t*)of;
#pragma unroll
      for (int k = 0; k < 8; k++) {
        uint32_t x0 = 0, x2 = 0;
        if (g < 4) {
          x0 = hsub2(__byte_perm(cb[k], 0x64646464u, 0x4140), 0x64806480u);
          x2 = hsub2(__byte_perm(cb[k], 0x64646464u, 0x4342), 0x64806480u);
        } else if (g == 4) {
          x0 = ob[2 * k];
          x2 = ob[2 * k + 1];
        }
        mma(a, x0, 0u, x2, 0u, qd[k][0], qd[k][1]);
      }
    }
    a[0] *= rs;
    a[1] *= rs;
    uint32_t ah = h2(a[0], a[1]);
    float2 af = __half22float2(*(__half2*)&ah);
    uint32_t al = h2(a[0] - af.x, a[1] - af.y);
    uint32_t b0 = movm(ah), b1 = movm(al);
    float n0 = m0, n1 = m1;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float f0 = fscale(i, 0), f1 = fscale(i, 1);
      s[i][0] *= f0;
      s[i][1] *= f0;
      s[i][2] *= f1;
      s[i][3] *= f1;
      uint4 e = sE[i * 32 + lane];
      mma(s[i], e.x, e.y, e.z, e.w, b0, b1);
      n0 = fmaxf(n0, fmaxf(s[i][0], s[i][2]));
      n1 = fmaxf(n1, fmaxf(s[i][1], s[i][3]));
    }
    // next page's K while V is worked on
    const uint8_t* cur = rec;
    if (p + 1 < hi) {
      rec = pages + (long)row[p + 1] * page_bytes + (long)h * REC;
#pragma unroll
      for (int k = 0; k < NK; k++) kw[k] = ldg(rec + KC + k * 512 + lane * 16);
    }
    uint4 vs4[2], vz4[2];
    vs4[0] = ldg(cur + VS + g * 32);
    vs4[1] = ldg(cur + VS + g * 32 + 16);
    vz4[0] = ldg(cur + VZ + g * 32);
    vz4[1] = ldg(cur + VZ + g * 32 + 16);
#pragma unroll
    for (int d = 4; d < 32; d <<= 1) {
      n0 = fmaxf(n0, __shfl_xor_sync(~0u, n0, d));
      n1 = fmaxf(n1, __shfl_xor_sync(~0u, n1, d));
    }
    float al0 = ex2(m0 - n0), al1 = ex2(m1 - n1);
    m0 = n0;
    m1 = n1;
    l0 *= al0;
    l1 *= al1;
    z0 *= al0;
    z1 *= al1;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      o[i][0] *= al0;
      o[i][1] *= al1;
      o[i][2] *= al0;
      o[i][3] *= al1;
    }
    const __half2* vs = (const __half2*)vs4;
    const __half2* vz = (const __half2*)vz4;
#pragma unroll
    for (int i = 0; i < 8; i++) {
      float2 sc = __half22float2(vs[i]), zr = __half22float2(vz[i]);
      float p0 = ex2(s[i][0] - n0), p1 = ex2(s[i][1] - n1), p2 = ex2(s[i][2] - n0), p3 = ex2(s[i][3] - n1);
      l0 += p0 + p2;
      l1 += p1 + p3;
      z0 += p0 * zr.x + p2 * zr.y;
      z1 += p1 * zr.x + p3 * zr.y;
      tile(o, vw[i], movm(h2(p0 * sc.x, p1 * sc.x)), movm(h2(p2 * sc.y, p3 * sc.y)));
    }
  }
#pragma unroll
  for (int d = 4; d < 32; d <<= 1) {
    l0 += __shfl_xor_sync(~0u, l0, d);
    l1 += __shfl_xor_sync(~0u, l1, d);
    z0 += __shfl_xor_sync(~0u, z0, d);
    z1 += __shfl_xor_sync(~0u, z1, d);
  }
  if (t < 2) {
    long base = (((long)(b * H + h)) * 4 + 2 * t) * splits + split;  // rows 2t and 2t+1
    float i0 = l0 > 0 ? 1.f / l0 : 0.f, i1 = l1 > 0 ? 1.f / l1 : 0.f;
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
      for (int rh = 0; rh < 2; rh++) {
        int d = i * 16 + rh * 8 + g;
        float f = fscale(i, rh);
        out[base * D + d] = (o[i][2 * rh] * f + z0) * i0;
        out[(base + splits) * D + d] = (o[i][2 * rh + 1] * f + z1) * i1;
      }
    if (g == 0) {
      lse[base] = m0 + log2f(fmaxf(l0, 1e-37f));
      lse[base + splits] = m1 + log2f(fmaxf(l1, 1e-37f));
    }
  }
}
extern "C" void launch(const void* q, const void* pages, const int* table, const int* np, const void* basis,
                       const void* qcol, float* out, float* lse, int ts, int B, int H, long pb, int splits,
                       void* stream) {
  decode<<<dim3(splits / 4, H, B), 128, 0, (cudaStream_t)stream>>>(
      (const __half*)q, (const uint8_t*)pages, table, np, (const uint4*)basis, (const __half*)qcol, out, lse,
      ts, H, pb, splits);
}
