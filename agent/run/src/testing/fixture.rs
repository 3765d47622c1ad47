//! Run directories made by hand, byte by byte from the format's description and not by the writer under test.

use std::{fs, path::Path};

use tempfile::TempDir;
use wire::{
    dtype::DType,
    hooks::Kind,
    loss_scale::LossScale,
    record::{Axis, Placement, Sliced},
};

use crate::format::{
    FILLER, FORMAT, HEADER_SPACE, Identity, JobId, Joined, Line, Location, MANIFEST_FILE, Part, RUN_FILE, RunInfo,
    TENSOR_ALIGN, What,
};

/// A run being made; [`Fixture::finish`] seals it.
pub struct Fixture {
    dir: TempDir,
    shard: Vec<u8>,
    entries: Vec<(String, &'static str, Vec<u64>, u64, u64)>,
    /// The manifest so far.
    pub lines: Vec<u8>,
    /// Of the parts that are added next.
    pub loss_scale: LossScale,
    /// What the parts that are added next are a slice by.
    pub slice: Option<Sliced>,
    /// Of the hooks that they were captured under.
    pub revision: u64,
}

/// `step` of a module's forward output.
pub fn id(module: &str, step: u64) -> Identity {
    Identity {
        job: JobId::default(),
        module: module.into(),
        kind: Kind::Forward,
        path: "out".into(),
        model: 0,
        step,
        micro: 0,
        call: 0,
        repeat: 0,
        train: true,
        apart: None,
        own: false,
        pending: false,
        again: 0,
    }
}

/// One axis named dp.
pub fn dp(index: u32, size: u32, place: Placement) -> Vec<Axis> {
    vec![Axis { name: "dp".into(), index, size, place, input_digest: None }]
}

/// Pieces of a dimension, lengths telling the offsets.
pub fn shard(dim: u32) -> Placement {
    Placement::Shard { dim }
}

/// Little-endian bytes of float32.
pub fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// A manifest line around any JSON.
pub fn line_of(rec: &str) -> Vec<u8> {
    format!("{{\"crc\":\"{:08x}\",\"rec\":{rec}}}\n", crc32c::crc32c(rec.as_bytes())).into_bytes()
}

impl Default for Fixture {
    fn default() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            shard: vec![0; HEADER_SPACE as usize],
            entries: Vec::new(),
            lines: Vec::new(),
            loss_scale: LossScale::ONE,
            slice: None,
            revision: 0,
        }
    }
}

impl Fixture {
    /// Where it is.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Adds what `rank` captured.
    pub fn part(&mut self, id: Identity, dtype: DType, shape: &[u64], rank: u32, axes: Vec<Axis>, bytes: &[u8]) {
        let offset = self.shard.len() as u64;
        self.shard.extend_from_slice(bytes);
        let name = format!("{id}.rank{rank}");
        let (kind, dims) = match dtype.safetensors() {
            Some(kind) => (kind, shape.to_vec()),
            None => ("U8", shape.iter().copied().chain([dtype.size() as u64]).collect()),
        };
        self.entries.push((name, kind, dims, offset, self.shard.len() as u64));
        let at = Location { shard: "shard-00000".into(), offset, len: bytes.len() as u64, crc: crc32c::crc32c(bytes) };
        let what = What {
            from: None,
            id,
            class: "MLP".into(),
            group: String::new(),
            dtype,
            shape: shape.to_vec(),
            slice: self.slice.clone(),
            rank,
            loss_scale: self.loss_scale,
            skipped: false,
            revision: self.revision,
            dp_size: axes.iter().filter(|axis| axis.name == "dp").map(|axis| axis.size).product(),
            axes,
            time_ns: 1,
            joined: Joined::default(),
        };
        self.line(&Line::Part(Part { what, at: Some(at), stats: None, same: None }));
    }

    /// Lets the next part start at a boundary, as the writer does for whole tensors.
    pub fn align(&mut self) {
        let from = self.shard.len() as u64;
        let to = from.next_multiple_of(TENSOR_ALIGN);
        self.shard.resize(to as usize, 0);
        if to > from {
            self.entries.push((format!("{FILLER}{from}"), "U8", vec![to - from], from, to));
        }
    }

    /// Appends a line to the manifest.
    pub fn line(&mut self, line: &Line) {
        self.lines.extend(line_of(&serde_json::to_string(line).unwrap()));
    }

    /// Writes `run.json` of a run that goes on or ended.
    pub fn info(&self, finished: bool) {
        let info = RunInfo {
            format: FORMAT,
            flexmodel: "0.1.0".into(),
            world: 2,
            finished_ns: finished.then_some(2),
            ..RunInfo::default()
        };
        fs::write(self.path().join(RUN_FILE), serde_json::to_vec(&info).unwrap()).unwrap();
    }

    /// Leaves a run whose agent was killed: an open shard, no end.
    pub fn kill(self) -> TempDir {
        self.info(false);
        fs::write(self.path().join("shard-00000.open"), &self.shard).unwrap();
        fs::write(self.path().join(MANIFEST_FILE), &self.lines).unwrap();
        self.dir
    }

    /// Seals the shard and ends the run.
    pub fn finish(mut self) -> TempDir {
        self.info(true);
        let mut header = serde_json::Map::new();
        for (name, dtype, shape, from, to) in &self.entries {
            let offsets = [from - HEADER_SPACE, to - HEADER_SPACE];
            header.insert(name.clone(), serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}));
        }
        let json = serde_json::to_vec(&header).unwrap();
        self.shard[..8].copy_from_slice(&(HEADER_SPACE - 8).to_le_bytes());
        self.shard[8..HEADER_SPACE as usize].fill(b' ');
        self.shard[8..8 + json.len()].copy_from_slice(&json);
        fs::write(self.path().join("shard-00000.safetensors"), &self.shard).unwrap();
        self.line(&Line::Sealed { shard: "shard-00000".into(), len: self.shard.len() as u64 });
        fs::write(self.path().join(MANIFEST_FILE), &self.lines).unwrap();
        self.dir
    }
}
