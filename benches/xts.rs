//! AES-XTS speed in cache and out of cache, by backend, unit and key size, with memcpy beside it.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use daxcrypt::memory::{Source, Store, Target};
use daxcrypt::secret::VolumeKey;
use daxcrypt::xts::{Backend, DataUnit, Span, XtsKey};

const IN_CACHE_BYTES: usize = 256 * 1024;

fn in_cache(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("xts in cache");
    group.throughput(Throughput::Bytes(IN_CACHE_BYTES as u64));
    let source = vec![7_u8; IN_CACHE_BYTES];
    let mut target = vec![0_u8; IN_CACHE_BYTES];
    group.bench_function("memcpy", |bench| bench.iter(|| target.copy_from_slice(black_box(&source))));
    for backend in Backend::available() {
        for key_bytes in [64, 32] {
            let key = XtsKey::new(&VolumeKey::generate(key_bytes).expect("the kernel has random bytes"), backend);
            for unit in [DataUnit::Bytes4096, DataUnit::Bytes512] {
                let span = Span { unit, tweak: 4096, skip_bytes: 0 };
                let name = format!("{backend}/AES-{}/{}", key_bytes * 4, unit.len_bytes());
                group.bench_function(BenchmarkId::new("encrypt", &name), |bench| {
                    bench.iter(|| {
                        let (src, dst) = (Source::from_slice(black_box(&source)), Target::from_slice(&mut target));
                        key.encrypt(span, src, dst, Store::Cached);
                    });
                });
                group.bench_function(BenchmarkId::new("decrypt", &name), |bench| {
                    bench.iter(|| {
                        let (src, dst) = (Source::from_slice(black_box(&source)), Target::from_slice(&mut target));
                        key.decrypt(span, src, dst);
                    });
                });
            }
        }
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).warm_up_time(std::time::Duration::from_millis(200)).measurement_time(std::time::Duration::from_millis(600));
    targets = in_cache
}
criterion_main!(benches);
