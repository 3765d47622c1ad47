//! A device that the job uses: its context, our streams on it, and what a thread does there.

use std::{
    ffi::{c_int, c_void},
    marker::PhantomData,
    ptr,
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use cudarc::driver::sys::{CU_MEMHOSTREGISTER_PORTABLE, CUcontext, CUdeviceptr, CUstream, CUstream_flags};

use crate::{
    Error, Event,
    driver::{Driver, outcome},
};

/// A stream, by its handle: torch's, or one of ours. 0 is the default stream of the device that is meant.
pub type Stream = usize;

/// More devices than a machine has.
const MOST: usize = 64;
/// Bytes of a copy to the host at a time: another copy of the job's does not wait for all of ours.
const PIECE: usize = 4 << 20;
/// `CU_STREAM_CAPTURE_MODE_RELAXED`.
const RELAXED: c_int = 2;
/// `CU_STREAM_CAPTURE_STATUS_NONE`.
const NOT_CAPTURING: c_int = 0;

static DEVICES: [OnceLock<Device>; MOST] = [const { OnceLock::new() }; MOST];

/// A device, for as long as the process lives.
pub struct Device {
    index: i32,
    /// Its primary context, which is torch's. An address.
    context: usize,
    pub(crate) driver: &'static Driver,
    /// Streams of our own: torch's are shared with the job, which may capture one, or wait for it.
    copies: OnceLock<Stream>,
    transfers: OnceLock<Stream>,
    making: Mutex<()>,
    /// Events that nobody uses, by their addresses.
    pub(crate) events: Mutex<Vec<usize>>,
}

impl Device {
    /// The device with this index in torch.
    ///
    /// # Errors
    /// There is none, or the process does not use it: no context is ever made on a device, which takes memory there.
    pub fn of(index: i32) -> Result<&'static Self, Error> {
        let place = usize::try_from(index).ok().and_then(|at| DEVICES.get(at)).ok_or(Error::NotUsed(index))?;
        match place.get() {
            Some(device) => Ok(device),
            None => {
                let device = Self::find(index)?;
                Ok(place.get_or_init(|| device))
            }
        }
    }

    fn find(index: i32) -> Result<Self, Error> {
        let driver = Driver::loaded()?;
        let (mut device, mut flags, mut active, mut context) = (0, 0, 0, ptr::null_mut());
        // SAFETY: writes one int.
        outcome("cuDeviceGet", unsafe { (driver.device_get)(&mut device, index) })?;
        // SAFETY: writes two ints.
        let code = unsafe { (driver.primary_state)(device, &mut flags, &mut active) };
        outcome("cuDevicePrimaryCtxGetState", code)?;
        if active == 0 {
            return Err(Error::NotUsed(index));
        }
        // It is there, and stays: this makes none.
        // SAFETY: writes one pointer.
        let code = unsafe { (driver.primary_retain)(&mut context, device) };
        outcome("cuDevicePrimaryCtxRetain", code)?;
        Ok(Self {
            index,
            context: context.addr(),
            driver,
            copies: OnceLock::new(),
            transfers: OnceLock::new(),
            making: Mutex::default(),
            events: Mutex::default(),
        })
    }

    /// Its index in torch.
    pub fn index(&self) -> i32 {
        self.index
    }

    /// Makes it the device of this thread, and puts the thread aside from graphs that are being captured, until what is
    /// returned is dropped: what the thread does meanwhile is no part of a graph that another thread of the job captures.
    /// CUDA would see it as one, in torch's default way of capturing, and fail the capture if it is an allocation, the query
    /// of an event or the page-locking of memory.
    pub fn aside(&self) -> Result<Aside<'_>, Error> {
        // SAFETY: the context lives as long as the process.
        outcome("cuCtxPushCurrent", unsafe { (self.driver.context_push)(self.context()) })?;
        let mut mode = RELAXED;
        // SAFETY: swaps a variable of this thread's, which has a context now.
        let swapped = unsafe { (self.driver.exchange_mode)(&mut mode) };
        let swapped = outcome("cuThreadExchangeStreamCaptureMode", swapped);
        let aside = Aside { driver: self.driver, mode: swapped.is_ok().then_some(mode), thread: PhantomData };
        swapped.map(|()| aside)
    }

    /// As [`Device::aside`], for good: the thread is ours.
    pub fn settle(&self) -> Result<(), Error> {
        // SAFETY: the context lives as long as the process.
        outcome("cuCtxSetCurrent", unsafe { (self.driver.context_set)(self.context()) })?;
        let mut mode = RELAXED;
        // SAFETY: swaps a variable of this thread's, which has a context now.
        outcome("cuThreadExchangeStreamCaptureMode", unsafe { (self.driver.exchange_mode)(&mut mode) })
    }

    /// Whether work on this stream goes into a CUDA graph instead of being run. An error has to be taken for a yes (DEVICE-2).
    pub fn is_capturing(&self, stream: Stream) -> Result<bool, Error> {
        let _aside = self.aside()?;
        let mut status = !NOT_CAPTURING;
        // SAFETY: the handle is a live stream of torch's; writes one int.
        let code = unsafe { (self.driver.is_capturing)(as_stream(stream), &mut status) };
        outcome("cuStreamIsCapturing", code).map(|()| status != NOT_CAPTURING)
    }

    /// Copies `bytes` bytes from an address on the device to `to`, by a stream on which nothing else is, and waits for
    /// them. They must be there already: nothing waits for them on the device.
    ///
    /// # Safety
    /// As many bytes can be read there and written at `to`, until this returns; for as long as the process lives after
    /// [`Error::Stuck`].
    pub unsafe fn fetch(&'static self, from: usize, bytes: usize, to: *mut u8) -> Result<(), Error> {
        let _aside = self.aside()?;
        let stream = self.stream(&self.copies)?;
        // Before the first copy: if there is none, nothing is under way.
        let event = Event::new(self)?;
        let mut under_way = false;
        let mut copy = || {
            for at in (0..bytes).step_by(PIECE) {
                let (piece, from) = (PIECE.min(bytes - at), (from + at) as CUdeviceptr);
                // SAFETY: the caller's, for all of the range; what is queued is waited for below.
                let code =
                    unsafe { (self.driver.to_host)(to.add(at).cast::<c_void>(), from, piece, as_stream(stream)) };
                outcome("cuMemcpyDtoHAsync", code)?;
                under_way = true;
            }
            event.put_on(stream)?;
            event.wait()
        };
        let copied = copy();
        copied.map_err(|why| {
            // SAFETY: the stream is ours.
            let passed = || outcome("", unsafe { (self.driver.stream_synchronize)(as_stream(stream)) }).is_ok();
            if !under_way || passed() { why } else { Error::Stuck(Box::new(why)) }
        })
    }

    /// The stream on which nothing is but transfers between ranks.
    pub fn transfers(&self) -> Result<Stream, Error> {
        let _aside = self.aside()?;
        self.stream(&self.transfers)
    }

    /// Page-locks memory so that a device can copy into it at full speed, while others of the process do what they do.
    /// `base` is mapped as long as the process lives.
    pub fn pin(&self, base: *mut u8, len: usize) -> Result<(), Error> {
        let _aside = self.aside()?;
        // SAFETY: the range is mapped, says the caller; no byte of it changes.
        let code = unsafe { (self.driver.register)(base.cast(), len, CU_MEMHOSTREGISTER_PORTABLE) };
        outcome("cuMemHostRegister", code)
    }

    fn context(&self) -> CUcontext {
        ptr::with_exposed_provenance_mut(self.context)
    }

    /// One of our streams, made when it is needed first; this thread is aside.
    fn stream(&self, which: &OnceLock<Stream>) -> Result<Stream, Error> {
        let _making = lock(&self.making);
        if let Some(&stream) = which.get() {
            return Ok(stream);
        }
        let (mut lowest, mut highest, mut stream) = (0, 0, ptr::null_mut());
        // SAFETY: writes two ints.
        let code = unsafe { (self.driver.priorities)(&mut lowest, &mut highest) };
        outcome("cuCtxGetStreamPriorityRange", code)?;
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes one handle.
        let code = unsafe { (self.driver.stream_create)(&mut stream, flags, lowest) };
        outcome("cuStreamCreateWithPriority", code)?;
        Ok(*which.get_or_init(|| stream.expose_provenance()))
    }
}

/// What a thread was before, which it becomes again.
pub struct Aside<'a> {
    driver: &'a Driver,
    /// `None`: it was not changed.
    mode: Option<c_int>,
    /// Of this thread alone.
    thread: PhantomData<*const ()>,
}

impl Drop for Aside<'_> {
    fn drop(&mut self) {
        if let Some(mut mode) = self.mode {
            // SAFETY: swaps a variable of this thread's. Nobody could do anything about a failure.
            let _ = unsafe { (self.driver.exchange_mode)(&mut mode) };
        }
        let mut popped = ptr::null_mut();
        // SAFETY: takes off what was pushed on this thread.
        let _ = unsafe { (self.driver.context_pop)(&mut popped) };
    }
}

pub(crate) fn as_stream(stream: Stream) -> CUstream {
    ptr::with_exposed_provenance_mut(stream)
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
