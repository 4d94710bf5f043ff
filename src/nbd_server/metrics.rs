//! A snapshot of a running server in the text format of OpenMetrics, which Prometheus reads.

use std::fmt::{self, Write};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;

use super::stats::{COMMAND_NAMES, ExportStatus, FAILURE_NAMES, LATENCY_BOUNDS, RekeyStatus, Status};

/// The type of the text, for HTTP.
pub(super) const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

impl Status {
    /// The snapshot in the text format of OpenMetrics 1.0.0.
    #[must_use]
    pub fn to_openmetrics(&self) -> String {
        let mut registry = Registry::with_prefix("daxcrypt_nbd");
        registry.register_collector(Box::new(Snapshot(self.clone())));
        let mut text = String::new();
        if encode(&mut text, &registry).is_err() {
            // Writing to a string does not fail.
            let _ = text.write_str("# EOF\n");
        }
        text
    }
}

#[derive(Debug)]
struct Snapshot(Status);

impl Snapshot {
    /// One metric of every export.
    fn each(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        (name, help, kind): (&str, &str, MetricType),
        put: impl Fn(&mut MetricEncoder<'_>, &ExportStatus) -> fmt::Result,
    ) -> fmt::Result {
        let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
        for export in &self.0.exports {
            put(&mut metric.encode_family(&[("export", export.name.as_str())])?, export)?;
        }
        Ok(())
    }

    fn gauge(&self, encoder: &mut DescriptorEncoder<'_>, (name, help): (&str, &str), value: u64) -> fmt::Result {
        encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)
    }
}

fn count(metric: &mut MetricEncoder<'_>, value: u64) -> fmt::Result {
    metric.encode_counter::<NoLabelSet, _, f64>(&value, None)
}

type Field = fn(&ExportStatus) -> u64;

/// What is counted for each export.
const COUNTERS: [(&str, &str, Field); 3] = [
    ("read_bytes", "Bytes that reads returned", |export| export.stats.read_bytes),
    ("written_bytes", "Bytes that writes brought", |export| export.stats.written_bytes),
    ("errors", "Requests that were answered with an error", |export| export.stats.errors),
];
/// What is measured of each export.
const GAUGES: [(&str, &str, Field); 5] = [
    ("size_bytes", "Size of the export", |export| export.size_bytes),
    ("read_only", "1 if the export refuses writes", |export| u64::from(export.read_only)),
    ("poisoned", "1 if a flush has failed, so that nothing is known to become durable any more", |export| {
        u64::from(export.poisoned)
    }),
    ("locked", "1 if the export is locked: its key is not there, and requests wait or fail", |export| {
        u64::from(export.locked)
    }),
    ("resident_plaintext_bytes", "Plaintext that is kept outside of requests' buffers", |export| {
        export.resident_plaintext_bytes
    }),
];

type RekeyField = fn(&RekeyStatus) -> u64;

/// What is measured of the re-key of each export; 0 where there is none.
const REKEY_GAUGES: [(&str, &str, RekeyField); 6] = [
    ("rekey_done_bytes", "How far the re-key has come", |rekey| {
        rekey.progress.map_or(0, |progress| progress.done_bytes)
    }),
    ("rekey_total_bytes", "How far it has to go; 0 if none is under way", |rekey| {
        rekey.progress.map_or(0, |progress| progress.total_bytes)
    }),
    ("rekey_bytes_per_second", "How fast it goes, over the last seconds", |rekey| rekey.bytes_per_second),
    ("rekey_running", "1 while the server is at it", |rekey| u64::from(rekey.running)),
    ("rekey_paused", "1 if it rests until it is resumed", |rekey| u64::from(rekey.paused)),
    ("rekey_failed", "1 if it could not go on; the status says why", |rekey| u64::from(rekey.failed.is_some())),
];

impl Collector for Snapshot {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (mut encoder, status) = (encoder, &self.0);
        self.gauge(&mut encoder, ("uptime_seconds", "Seconds since the server was made"), status.uptime_seconds)?;
        let connections = ("connections", "Open connections, those without an export included");
        self.gauge(&mut encoder, connections, status.connections as u64)?;
        let buffers = ("buffer_bytes", "Large buffers in use, with the socket buffers that were enlarged for them");
        self.gauge(&mut encoder, buffers, status.buffer_bytes as u64)?;
        let mut requests = encoder.encode_descriptor("requests", "Requests by command", None, MetricType::Counter)?;
        for export in &status.exports {
            for (command, value) in COMMAND_NAMES.into_iter().zip(export.stats.requests) {
                let labels = [("export", export.name.as_str()), ("command", command)];
                count(&mut requests.encode_family(&labels)?, value)?;
            }
        }
        for (name, help, value) in COUNTERS {
            self.each(&mut encoder, (name, help, MetricType::Counter), |metric, export| count(metric, value(export)))?;
        }
        for (name, help, value) in GAUGES {
            self.each(&mut encoder, (name, help, MetricType::Gauge), |metric, export| {
                metric.encode_gauge(&value(export))
            })?;
        }
        let help = "Requests that were answered with an error, by reason";
        let mut failures = encoder.encode_descriptor("failures", help, None, MetricType::Counter)?;
        for export in &status.exports {
            for (reason, value) in FAILURE_NAMES.into_iter().zip(export.stats.failures) {
                count(&mut failures.encode_family(&[("export", export.name.as_str()), ("reason", reason)])?, value)?;
            }
        }
        for (name, help, value) in REKEY_GAUGES {
            self.each(&mut encoder, (name, help, MetricType::Gauge), |metric, export| {
                let rekey = status.rekeys.iter().find(|rekey| rekey.export == export.name);
                metric.encode_gauge(&rekey.map_or(0, value))
            })?;
        }
        let help = "Time from a request's header to its reply being ready to send";
        self.each(&mut encoder, ("request_duration_seconds", help, MetricType::Histogram), |metric, export| {
            let counts = export.stats.latency_counts();
            let bounds = LATENCY_BOUNDS.iter().map(|nanoseconds| *nanoseconds as f64 / 1e9).chain([f64::INFINITY]);
            let buckets: Vec<_> = bounds.zip(counts).collect();
            let sum = export.stats.latency_sum_ns as f64 / 1e9;
            metric.encode_histogram::<NoLabelSet>(sum, counts.iter().sum(), &buckets, None)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::stats::{Stats, Traffic};
    use super::super::wire::{NBD_CMD_WRITE, RequestHeader};
    use super::*;
    use crate::volume::TransformProgress;

    #[test]
    fn the_page_has_help_and_buckets_that_add_up() {
        let traffic = Traffic::default();
        let header = RequestHeader { flags: 0, command: NBD_CMD_WRITE, cookie: 0, offset: 0, len_bytes: 10 };
        for nanoseconds in [500, 1023, 1024, 5000, 1 << 40] {
            traffic.record(&header, Duration::from_nanos(nanoseconds), false);
        }
        traffic.record_failure(0);
        let mut stats = Stats::default();
        stats.add(&traffic);
        let export = ExportStatus {
            name: "a\"b\\c\nd".into(),
            size_bytes: 4096,
            read_only: true,
            poisoned: false,
            locked: false,
            resident_plaintext_bytes: 7,
            stats,
        };
        let other = ExportStatus { name: "other".into(), ..export.clone() };
        let rekey = RekeyStatus {
            export: export.name.clone(),
            path: "/srv/a.img".into(),
            progress: Some(TransformProgress { done_bytes: 11, total_bytes: 22 }),
            bytes_per_second: 33,
            seconds_left: Some(1),
            paused: false,
            running: true,
            failed: Some("no".into()),
        };
        let status = Status {
            uptime_seconds: 1,
            connections: 2,
            buffer_bytes: 3,
            exports: vec![export, other],
            clients: Vec::new(),
            rekeys: vec![rekey],
        };
        let text = status.to_openmetrics();
        let name = r#"export="a\"b\\c\nd""#;
        for line in [
            "# HELP daxcrypt_nbd_requests Requests by command".to_owned(),
            "# TYPE daxcrypt_nbd_request_duration_seconds histogram".to_owned(),
            format!("daxcrypt_nbd_requests_total{{{name},command=\"write\"}} 5"),
            format!("daxcrypt_nbd_written_bytes_total{{{name}}} 50"),
            format!("daxcrypt_nbd_read_only{{{name}}} 1"),
            format!("daxcrypt_nbd_request_duration_seconds_count{{{name}}} 5"),
            format!("daxcrypt_nbd_failures_total{{{name},reason=\"media\"}} 1"),
            format!("daxcrypt_nbd_failures_total{{{name},reason=\"invalid\"}} 0"),
            format!("daxcrypt_nbd_rekey_done_bytes{{{name}}} 11"),
            format!("daxcrypt_nbd_rekey_total_bytes{{{name}}} 22"),
            format!("daxcrypt_nbd_rekey_bytes_per_second{{{name}}} 33"),
            format!("daxcrypt_nbd_rekey_running{{{name}}} 1"),
            format!("daxcrypt_nbd_rekey_paused{{{name}}} 0"),
            format!("daxcrypt_nbd_rekey_failed{{{name}}} 1"),
            "daxcrypt_nbd_rekey_total_bytes{export=\"other\"} 0".to_owned(),
            "# EOF".to_owned(),
        ] {
            assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
        }
        let buckets: Vec<_> = text.lines().filter(|line| line.contains("_bucket{") && line.contains(name)).collect();
        let values: Vec<u64> = buckets.iter().map(|line| line.rsplit(' ').next().unwrap().parse().unwrap()).collect();
        assert_eq!(buckets.len(), LATENCY_BOUNDS.len() + 1);
        assert!(buckets.iter().any(|line| line.contains("le=\"+Inf\"") && line.ends_with(" 5")), "{buckets:?}");
        // Up to 1.024 us there are two, up to 4.096 us three, up to 16.384 us four.
        assert_eq!(values[..3], [2, 3, 4], "{buckets:?}");
        assert_eq!(values[values.len() - 2..], [4, 5], "{buckets:?}");
    }
}
