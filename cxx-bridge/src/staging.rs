//! Tensors of our own: what is staged for other ranks, and what is on its way from a device to the host.

use std::sync::Arc;

use cxx::UniquePtr;
use devices::{Aside, Device, Event};
use wire::{codes::CopyState, dtype::DType};

use crate::{
    ffi::bridge::{self, Place, Tensor},
    gather::first_line,
};

/// A row-major tensor of ours, on the CPU or on a device.
pub struct Staged {
    pub tensor: UniquePtr<Tensor>,
    /// Its index, or -1.
    pub device: i32,
    /// It is there once this has come. `None`: it is.
    come: Option<Arc<Event>>,
}

impl Staged {
    /// A copy of a tap's tensor, as the job's stream has it now.
    pub fn of(tensor: &Tensor, dtype: u8) -> Result<Self, String> {
        let place = readable(tensor)?;
        let _aside = aside_at(&place)?;
        let tensor = bridge::stage(tensor, dtype).map_err(said)?;
        Ok(Self { tensor, device: place.device, come: come(place)? })
    }

    /// Room for what another rank sends, which is there.
    pub fn receiver(dtype: u8, sizes: &[u64], device: i32) -> Result<Self, String> {
        let tensor = if device < 0 {
            bridge::receiver(dtype, sizes, Place { device, stream: 0 })
        } else {
            let on = Device::of(device).map_err(|why| why.to_string())?;
            let stream = on.transfers().map_err(|why| why.to_string())?;
            let _aside = on.aside().map_err(|why| why.to_string())?;
            bridge::receiver(dtype, sizes, Place { device, stream })
        };
        Ok(Self { tensor: tensor.map_err(said)?, device, come: None })
    }

    /// How far it is.
    pub fn state(&self) -> CopyState {
        match self.come.as_ref().map_or(Ok(true), |event| event.has_come()) {
            Ok(true) => CopyState::Done,
            Ok(false) => CopyState::Pending,
            Err(_) => CopyState::Failed,
        }
    }

    /// A copy of elements `first .. first + count` to the host, which is made when it is waited for.
    pub fn ticket(&self, dtype: u8, first: u64, count: u64, to: *mut u8) -> Result<Ticket, String> {
        let item = DType::from_code(dtype).map(DType::size).ok_or("an unknown element type")?;
        let from = bridge::address_of(&self.tensor) + first as usize * item;
        Ticket::new(bridge::share(&self.tensor), self.device, self.come.clone(), from, count as usize * item, to)
    }
}

/// A copy from a device to the host that is yet to be made. Owns what it reads.
pub struct Ticket {
    tensor: UniquePtr<Tensor>,
    device: &'static Device,
    come: Option<Arc<Event>>,
    from: usize,
    bytes: usize,
    to: *mut u8,
}

impl Ticket {
    fn new(
        tensor: UniquePtr<Tensor>,
        device: i32,
        come: Option<Arc<Event>>,
        from: usize,
        bytes: usize,
        to: *mut u8,
    ) -> Result<Self, String> {
        let device = Device::of(device).map_err(|why| why.to_string())?;
        Ok(Self { tensor, device, come, from, bytes, to })
    }

    /// Of a tap's tensor: a snapshot on the job's stream first, so that a later in-place operation does not change the
    /// record.
    pub fn of(tensor: &Tensor, dtype: u8, first: u64, count: u64, to: *mut u8) -> Result<Self, String> {
        let place = readable(tensor)?;
        let _aside = aside_at(&place)?;
        let device = place.device;
        let snapshot = bridge::snapshot(tensor, dtype, first, count).map_err(said)?;
        let (from, bytes) = (bridge::address_of(&snapshot), bridge::bytes_of(&snapshot));
        Self::new(snapshot, device, come(place)?, from, bytes, to)
    }

    /// Pins memory for copies from its device.
    pub fn pin(&self, base: *mut u8, len: usize) -> Result<(), String> {
        self.device.pin(base, len).map_err(|why| why.to_string())
    }

    /// Waits until the tensor is there, and copies it. What waits is this thread, which is none of the job's: into memory
    /// that is not pinned CUDA copies only when the device has come to it, and holds its caller until then.
    ///
    /// # Safety
    /// `to` takes the bytes, and does so for as long as the process lives after [`devices::Error::Stuck`].
    pub unsafe fn wait(self) -> Result<(), devices::Error> {
        let Self { tensor, device, come, from, bytes, to } = self;
        // SAFETY: the tensor has the bytes, and lives through the call; the caller vouches for `to`.
        let outcome = come.map_or(Ok(()), |event| event.wait()).and_then(|()| unsafe { device.fetch(from, bytes, to) });
        if matches!(outcome, Err(devices::Error::Stuck(_))) {
            // It may still be read.
            std::mem::forget(tensor);
            return outcome;
        }
        // What goes back to torch's allocator does so aside.
        let _aside = device.aside()?;
        drop(tensor);
        outcome
    }
}

/// Where a tensor is and by which stream it is read; an error where that stream is captured into a CUDA graph, or nobody can
/// say: what is put on it would be replayed into memory that is long somebody else's, and break the capture.
pub fn readable(tensor: &Tensor) -> Result<Place, String> {
    let place = bridge::place_of(tensor);
    match place.device >= 0 && asked(place.device, place.stream).map_err(|why| why.to_string())? {
        true => Err("the stream is being captured into a CUDA graph".to_owned()),
        false => Ok(place),
    }
}

fn asked(device: i32, stream: usize) -> Result<bool, devices::Error> {
    Device::of(device)?.is_capturing(stream)
}

/// For C++, as [`Device::is_capturing`]: also where nobody can say.
pub fn is_capturing(device: i32, stream: usize) -> bool {
    asked(device, stream).unwrap_or(true)
}

/// Has this thread aside where a tensor is: what it allocates there would break what another thread captures (DEVICE-2).
fn aside_at(place: &Place) -> Result<Option<Aside<'static>>, String> {
    let device = (place.device >= 0).then(|| Device::of(place.device)).transpose();
    device.and_then(|device| device.map(Device::aside).transpose()).map_err(|why| why.to_string())
}

/// An [`Aside`] of C++'s.
pub struct Apart(#[expect(dead_code, reason = "it is only dropped")] Aside<'static>);

/// For C++, as [`Device::aside`].
pub fn aside(device: i32) -> Result<Box<Apart>, devices::Error> {
    Device::of(device)?.aside().map(|aside| Box::new(Apart(aside)))
}

/// An [`Event`] of C++'s.
pub struct Mark(Event);

impl Mark {
    /// As [`Event::hold`].
    pub fn hold(&self, stream: usize) -> Result<(), devices::Error> {
        self.0.hold(stream)
    }

    /// As [`Event::wait`].
    pub fn wait(&self) -> Result<(), devices::Error> {
        self.0.wait()
    }
}

/// For C++, as [`Event::record`].
pub fn recorded(device: i32, stream: usize) -> Result<Box<Mark>, devices::Error> {
    Event::record(Device::of(device)?, stream).map(|event| Box::new(Mark(event)))
}

/// Comes when what was put on the job's stream is done.
fn come(place: Place) -> Result<Option<Arc<Event>>, String> {
    if place.device < 0 {
        return Ok(None);
    }
    let event = Device::of(place.device).and_then(|device| Event::record(device, place.stream));
    event.map(|event| Some(Arc::new(event))).map_err(|why| why.to_string())
}

fn said(why: cxx::Exception) -> String {
    first_line(&why).to_owned()
}
