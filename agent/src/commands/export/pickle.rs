//! The pickle (protocol 2) of a dict of tensors, as `torch.save` writes it and `torch.load(weights_only=True)` takes it.

use wire::dtype::DType;

/// One tensor; its bytes are the archive's entry `data/KEY`.
pub struct Tensor {
    /// Key in the dict.
    pub name: String,
    /// Element type.
    pub dtype: DType,
    /// Shape.
    pub shape: Vec<u64>,
    /// Number of its storage.
    pub key: usize,
}

/// The pickle of `{name: tensor, ...}`.
pub fn dict(tensors: &[Tensor]) -> Vec<u8> {
    let mut p = Pickle(vec![0x80, 2, b'}', b'(']);
    for tensor in tensors {
        p.string(&tensor.name);
        p.tensor(tensor);
    }
    p.0.extend_from_slice(b"u.");
    p.0
}

struct Pickle(Vec<u8>);

impl Pickle {
    fn global(&mut self, module: &str, name: &str) {
        self.0.extend_from_slice(format!("c{module}\n{name}\n").as_bytes());
    }

    /// Strings here are far shorter than 4 GiB.
    fn string(&mut self, s: &str) {
        self.0.push(b'X');
        self.0.extend_from_slice(&(s.len() as u32).to_le_bytes());
        self.0.extend_from_slice(s.as_bytes());
    }

    fn int(&mut self, n: u64) {
        if let Ok(byte) = u8::try_from(n) {
            self.0.extend_from_slice(&[b'K', byte]);
        } else if let Ok(int) = i32::try_from(n) {
            self.0.push(b'J');
            self.0.extend_from_slice(&int.to_le_bytes());
        } else {
            // LONG1: two's complement, so a ninth byte keeps it positive.
            self.0.extend_from_slice(&[0x8a, 9]);
            self.0.extend_from_slice(&n.to_le_bytes());
            self.0.push(0);
        }
    }

    fn ints(&mut self, values: &[u64]) {
        self.0.push(b'(');
        values.iter().for_each(|&n| self.int(n));
        self.0.push(b't');
    }

    /// `_rebuild_tensor_v2(storage, 0, size, stride, False, OrderedDict())`, or `v3` with the dtype and an untyped
    /// storage for the types that torch has no storage class for.
    fn tensor(&mut self, t: &Tensor) {
        let elements: u64 = t.shape.iter().product();
        let class = storage_class(t.dtype);
        self.global("torch._utils", if class.is_some() { "_rebuild_tensor_v2" } else { "_rebuild_tensor_v3" });
        self.0.extend_from_slice(b"((");
        self.string("storage");
        match class {
            Some(class) => self.global("torch", class),
            None => self.global("torch.storage", "UntypedStorage"),
        }
        self.string(&t.key.to_string());
        self.string("cpu");
        self.int(if class.is_some() { elements } else { elements * t.dtype.size() as u64 });
        self.0.extend_from_slice(b"tQ");
        self.int(0);
        self.ints(&t.shape);
        self.ints(&strides(&t.shape));
        self.0.push(0x89);
        self.global("collections", "OrderedDict");
        self.0.extend_from_slice(b")R");
        if class.is_none() {
            self.global("torch", t.dtype.name());
        }
        self.0.extend_from_slice(b"tR");
    }
}

fn strides(shape: &[u64]) -> Vec<u64> {
    let mut strides = vec![1u64; shape.len()];
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d].saturating_mul(shape[d].max(1));
    }
    strides
}

fn storage_class(dtype: DType) -> Option<&'static str> {
    Some(match dtype {
        DType::Float64 => "DoubleStorage",
        DType::Float32 => "FloatStorage",
        DType::Float16 => "HalfStorage",
        DType::BFloat16 => "BFloat16Storage",
        DType::Int64 => "LongStorage",
        DType::Int32 => "IntStorage",
        DType::Int16 => "ShortStorage",
        DType::Int8 => "CharStorage",
        DType::UInt8 => "ByteStorage",
        DType::Bool => "BoolStorage",
        DType::Complex64 => "ComplexFloatStorage",
        DType::Complex128 => "ComplexDoubleStorage",
        _ => return None,
    })
}
