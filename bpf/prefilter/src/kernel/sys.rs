//! The calls of bpf(2) on maps that aya has no typed interface for: whole batches, and values of inner maps.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::OnceLock;

use aya_obj::generated::{bpf_attr, bpf_cmd, bpf_link_info};

/// Most elements handed over in one call, so that a call does not hold the CPU for long.
const BATCH: usize = 1 << 16;

/// Inserts or replaces one element.
pub(super) fn update(map: BorrowedFd<'_>, key: &[u8], value: &[u8]) -> io::Result<()> {
    element(bpf_cmd::BPF_MAP_UPDATE_ELEM, map, key, value.as_ptr().cast_mut())
}

/// Removes one element; whether it was there.
pub(super) fn delete(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<bool> {
    match element(bpf_cmd::BPF_MAP_DELETE_ELEM, map, key, std::ptr::null_mut()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads the element at `key` into `value`, which has the map's value size, times the number of CPUs for per-CPU
/// maps.
pub(super) fn lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<()> {
    element(bpf_cmd::BPF_MAP_LOOKUP_ELEM, map, key, value.as_mut_ptr())
}

/// All keys of a hash whose keys have `N` bytes, and which nobody else changes meanwhile.
pub(super) fn keys<const N: usize>(map: BorrowedFd<'_>) -> io::Result<Vec<[u8; N]>> {
    let mut keys = Vec::new();
    let mut last: Option<[u8; N]> = None;
    loop {
        let mut next = [0; N];
        let mut attr = zeroed();
        // SAFETY: this is the member of the union that commands on elements use.
        let element = unsafe { &mut attr.__bindgen_anon_2 };
        element.map_fd = map.as_raw_fd() as u32;
        element.key = last.as_ref().map_or(0, |key| key.as_ptr() as u64);
        element.__bindgen_anon_1.next_key = next.as_mut_ptr() as u64;
        // SAFETY: both keys have the size of the map's, as the caller says.
        match unsafe { bpf(bpf_cmd::BPF_MAP_GET_NEXT_KEY, &mut attr) } {
            Ok(()) => keys.push(next),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(keys),
            Err(error) => return Err(error),
        }
        last = Some(next);
    }
}

/// Inserts or replaces elements: `keys` and `values` hold them one after another.
pub(super) fn update_batch(
    map: BorrowedFd<'_>,
    keys: &[u8],
    key_size: usize,
    values: &[u8],
    value_size: usize,
) -> io::Result<()> {
    assert_eq!(
        keys.len() / key_size,
        values.len() / value_size,
        "every key has a value"
    );
    for (keys, values) in keys
        .chunks(BATCH * key_size)
        .zip(values.chunks(BATCH * value_size))
    {
        let mut attr = zeroed();
        attr.batch.keys = keys.as_ptr() as u64;
        attr.batch.values = values.as_ptr() as u64;
        attr.batch.count = (keys.len() / key_size) as u32;
        attr.batch.map_fd = map.as_raw_fd() as u32;
        // SAFETY: keys and values are as long as their number says, and the kernel only reads them.
        unsafe { bpf(bpf_cmd::BPF_MAP_UPDATE_BATCH, &mut attr) }?;
    }
    Ok(())
}

/// Reads `count` elements of an array from `first` on; `value_size` as for [`lookup`].
pub(super) fn lookup_array(
    map: BorrowedFd<'_>,
    first: u32,
    count: u32,
    value_size: usize,
) -> io::Result<Vec<u8>> {
    let mut values = vec![0; count as usize * value_size];
    let mut keys = vec![0u32; count as usize];
    let mut read = 0;
    // The kernel goes on behind the key it is given, and says where it got to.
    let mut cursor = first.wrapping_sub(1);
    while read < count as usize {
        let wanted = (count as usize - read).min(BATCH);
        let mut next = 0u32;
        let mut attr = zeroed();
        let is_start = cursor == u32::MAX;
        attr.batch.in_batch = if is_start { 0 } else { &raw const cursor as u64 };
        attr.batch.out_batch = &raw mut next as u64;
        attr.batch.keys = keys[read..].as_mut_ptr() as u64;
        attr.batch.values = values[read * value_size..].as_mut_ptr() as u64;
        attr.batch.count = wanted as u32;
        attr.batch.map_fd = map.as_raw_fd() as u32;
        // SAFETY: there is room for as many keys and values as are asked for.
        let done = unsafe { bpf(bpf_cmd::BPF_MAP_LOOKUP_BATCH, &mut attr) };
        // SAFETY: the kernel writes the number of elements here, also with an error.
        let got = unsafe { attr.batch.count } as usize;
        match done {
            Ok(()) => {}
            // The end of the map was reached.
            Err(error) if error.kind() == io::ErrorKind::NotFound && got > 0 => {}
            Err(error) => return Err(error),
        }
        read += got;
        cursor = next;
    }
    Ok(values)
}

/// Pins a map or program.
pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = zeroed();
    // SAFETY: this is the member of the union that the command uses.
    let pinned = unsafe { &mut attr.__bindgen_anon_4 };
    pinned.pathname = path.as_ptr() as u64;
    pinned.bpf_fd = object.as_raw_fd() as u32;
    // SAFETY: the path ends with a zero byte.
    unsafe { bpf(bpf_cmd::BPF_OBJ_PIN, &mut attr) }
}

/// Opens what is pinned at `path`.
pub(super) fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = zeroed();
    // SAFETY: this is the member of the union that the command uses.
    unsafe { &mut attr.__bindgen_anon_4 }.pathname = path.as_ptr() as u64;
    // SAFETY: the path ends with a zero byte.
    let descriptor = unsafe { call(bpf_cmd::BPF_OBJ_GET, &mut attr) }?;
    // SAFETY: the kernel has just made it, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor as i32) })
}

/// Takes a link's program off its interface, whoever else holds the link.
pub(super) fn detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = zeroed();
    attr.link_detach.link_fd = link.as_raw_fd() as u32;
    // SAFETY: nothing is pointed to.
    unsafe { bpf(bpf_cmd::BPF_LINK_DETACH, &mut attr) }
}

/// Index of the interface that an XDP link is on; 0 if that is gone.
pub(super) fn link_interface(link: BorrowedFd<'_>) -> io::Result<u32> {
    // SAFETY: plain numbers, which may all be zero.
    let mut info: bpf_link_info = unsafe { std::mem::zeroed() };
    let mut attr = zeroed();
    attr.info.bpf_fd = link.as_raw_fd() as u32;
    attr.info.info_len = size_of::<bpf_link_info>() as u32;
    attr.info.info = &raw mut info as u64;
    // SAFETY: there is as much room as is said.
    unsafe { bpf(bpf_cmd::BPF_OBJ_GET_INFO_BY_FD, &mut attr) }?;
    // SAFETY: links that this crate pins are of XDP.
    Ok(unsafe { info.__bindgen_anon_1.xdp.ifindex })
}

/// Number of CPUs a per-CPU map has values for.
pub(super) fn possible_cpus() -> io::Result<usize> {
    static COUNT: OnceLock<usize> = OnceLock::new();
    if let Some(&count) = COUNT.get() {
        return Ok(count);
    }
    let count = aya::util::nr_cpus().map_err(|(_, error)| error)?;
    Ok(*COUNT.get_or_init(|| count))
}

fn element(command: bpf_cmd, map: BorrowedFd<'_>, key: &[u8], value: *mut u8) -> io::Result<()> {
    let mut attr = zeroed();
    // SAFETY: this is the member of the union that commands on elements use.
    let element = unsafe { &mut attr.__bindgen_anon_2 };
    element.map_fd = map.as_raw_fd() as u32;
    element.key = key.as_ptr() as u64;
    element.__bindgen_anon_1.value = value as u64;
    // SAFETY: key and value have the sizes of the map, which the callers create it with.
    unsafe { bpf(command, &mut attr) }
}

fn zeroed() -> bpf_attr {
    // SAFETY: a union of plain numbers, which may all be zero; the kernel insists on it for what is not used.
    unsafe { std::mem::zeroed() }
}

/// # Safety
///
/// What `attr` points to must be valid for what `command` does with it.
unsafe fn bpf(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<()> {
    // SAFETY: the caller's promise.
    unsafe { call(command, attr) }.map(drop)
}

/// # Safety
///
/// As for [`bpf`].
unsafe fn call(command: bpf_cmd, attr: &mut bpf_attr) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a whole attribute; what it points to is the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command as libc::c_int, attr, size_of::<bpf_attr>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}
