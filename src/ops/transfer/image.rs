//! The disk image that is imported: a file or device that can be asked for its holes, or a stream that cannot.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

use rustix::io::Errno;

use crate::pmem::{Access, Extent, OpenOptions};

/// What is imported.
pub struct Image {
    file: Box<dyn ReadSource>,
    /// Unknown for a stream.
    len_bytes: Option<u64>,
    /// Up to where the data or hole reaches that was found last, and whether it is a hole.
    run: (u64, bool),
    /// The bytes of a file or disk that it is, where that can be told.
    extent: Option<Extent>,
}

/// A file that can be asked for its holes, or a stream that cannot.
trait ReadSource {
    fn read(&mut self, piece: &mut [u8]) -> io::Result<usize>;
    /// The end of the run of data or hole at `offset`, which is also where reading goes on.
    fn run_at(&mut self, offset: u64) -> io::Result<(u64, bool)>;
}

impl ReadSource for File {
    fn read(&mut self, piece: &mut [u8]) -> io::Result<usize> {
        Read::read(self, piece)
    }

    fn run_at(&mut self, offset: u64) -> io::Result<(u64, bool)> {
        let find = |position| match rustix::fs::seek(&*self, position) {
            Ok(found) => Ok(found),
            Err(Errno::NXIO) => Ok(u64::MAX),
            Err(errno) => Err(io::Error::from(errno)),
        };
        let data = find(rustix::fs::SeekFrom::Data(offset))?;
        let run = if data > offset { (data, true) } else { (find(rustix::fs::SeekFrom::Hole(offset))?, false) };
        self.seek(SeekFrom::Start(offset))?;
        Ok(run)
    }
}

/// What is read once, from its beginning to its end.
struct Stream<R>(R);

impl<R: Read> ReadSource for Stream<R> {
    fn read(&mut self, piece: &mut [u8]) -> io::Result<usize> {
        self.0.read(piece)
    }

    fn run_at(&mut self, _offset: u64) -> io::Result<(u64, bool)> {
        Ok((u64::MAX, false))
    }
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").field("len_bytes", &self.len_bytes).finish_non_exhaustive()
    }
}

impl Image {
    /// A stream: how much it is shows at its end.
    #[must_use]
    pub fn stream(from: impl Read + 'static) -> Self {
        Self { file: Box::new(Stream(from)), len_bytes: None, run: (0, false), extent: None }
    }

    /// The file or device at `path`.
    ///
    /// # Errors
    ///
    /// What the kernel says.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        // Of a block device the metadata do not tell the length.
        let len_bytes = file.seek(SeekFrom::End(0))?;
        // What cannot be a backing, such as an empty file, is none that could be written over.
        let backing = OpenOptions::new(Access::ReadOnly).lock_range(0..0).open(path);
        let extent = backing.ok().and_then(|backing| backing.extent().ok().flatten());
        Ok(Self { file: Box::new(file), len_bytes: Some(len_bytes), run: (0, false), extent })
    }

    /// Whether some of it is in one of `extents`.
    pub(super) fn overlaps(&self, extents: &[Extent]) -> bool {
        self.extent.as_ref().is_some_and(|image| extents.iter().any(|extent| extent.overlaps(image)))
    }

    /// Its length, which a stream does not tell.
    #[must_use]
    pub const fn len_bytes(&self) -> Option<u64> {
        self.len_bytes
    }

    /// Fills `piece`, or a part of it, with the bytes at `offset`; how many, and whether they are a hole. Offsets ascend.
    pub(super) fn read(&mut self, offset: u64, piece: &mut [u8]) -> io::Result<(usize, bool)> {
        let left = self.len_bytes.map_or(u64::MAX, |len_bytes| len_bytes - offset);
        if left == 0 || piece.is_empty() {
            return Ok((0, false));
        }
        if offset >= self.run.0 {
            self.run = self.file.run_at(offset)?;
        }
        let (end, hole) = self.run;
        let len = usize::try_from((end - offset).min(left)).unwrap_or(usize::MAX).min(piece.len());
        let piece = &mut piece[..len];
        if hole {
            piece.fill(0);
            return Ok((len, true));
        }
        let mut filled = 0;
        while filled < len {
            match self.file.read(&mut piece[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok((filled, false))
    }
}
