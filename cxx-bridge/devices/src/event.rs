//! Events: the only way to one leads through its device (DEVICE-1).

use std::ptr;

use cudarc::driver::sys::{CUevent, CUevent_flags};
use nccl_sys::Nap;

use crate::{
    Device, Error, Stream,
    device::{as_stream, lock},
    driver::{NOT_READY, outcome},
};

/// Events that are kept for the next, on each device.
const KEPT: usize = 1024;

/// Something that a stream had to do when it was recorded.
pub struct Event {
    device: &'static Device,
    /// An address.
    handle: usize,
}

impl Event {
    /// Comes when `stream`, of this device, has done what it has to do now.
    pub fn record(device: &'static Device, stream: Stream) -> Result<Self, Error> {
        let event = Self::new(device)?;
        event.put_on(stream).map(|()| event)
    }

    /// One that is on no stream yet.
    pub(crate) fn new(device: &'static Device) -> Result<Self, Error> {
        let _aside = device.aside()?;
        let kept = lock(&device.events).pop();
        let handle = match kept {
            Some(handle) => handle,
            None => {
                let mut made = ptr::null_mut();
                let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
                // SAFETY: writes one handle.
                outcome("cuEventCreate", unsafe { (device.driver.event_create)(&mut made, flags) })?;
                made.expose_provenance()
            }
        };
        Ok(Self { device, handle })
    }

    /// Puts it behind what `stream`, of its device, has to do now.
    pub(crate) fn put_on(&self, stream: Stream) -> Result<(), Error> {
        let _aside = self.device.aside()?;
        // SAFETY: the event is ours, and the stream a live one of its device, as the caller says.
        outcome("cuEventRecord", unsafe { (self.device.driver.event_record)(self.raw(), as_stream(stream)) })
    }

    /// Whether it has come.
    pub fn has_come(&self) -> Result<bool, Error> {
        let _aside = self.device.aside()?;
        // SAFETY: the event is ours.
        match unsafe { (self.device.driver.event_query)(self.raw()) } {
            NOT_READY => Ok(false),
            code => outcome("cuEventQuery", code).map(|()| true),
        }
    }

    /// Waits until it has come, on the host. Looked at now and then: waiting for the event itself would keep a core busy.
    pub fn wait(&self) -> Result<(), Error> {
        let mut nap = Nap::default();
        while !self.has_come()? {
            nap.take();
        }
        Ok(())
    }

    /// Has a stream of the same device wait for it. That is for what the job's own streams do for each other: none of ours
    /// waits on a device (DEVICE-3).
    pub fn hold(&self, stream: Stream) -> Result<(), Error> {
        let _aside = self.device.aside()?;
        // SAFETY: the event is ours, and the stream a live one, as the caller says.
        let code = unsafe { (self.device.driver.stream_wait)(as_stream(stream), self.raw(), 0) };
        outcome("cuStreamWaitEvent", code)
    }

    fn raw(&self) -> CUevent {
        ptr::with_exposed_provenance_mut(self.handle)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let mut events = lock(&self.device.events);
        if events.len() < KEPT {
            events.push(self.handle);
            return;
        }
        drop(events);
        if let Ok(_aside) = self.device.aside() {
            // SAFETY: the event is ours and not used again. Nobody could do anything about a failure.
            let _ = unsafe { (self.device.driver.event_destroy)(self.raw()) };
        }
    }
}
