package auditlog

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// Source is a log to read.
type Source struct {
	// Name is what problems are named by.
	Name string
	// Size is in bytes as it is on the disk; -1 where that cannot be known, as of a pipe.
	Size int64
	open func() (io.ReadCloser, error)
}

// Stdin is the name of the standard input among file names.
const Stdin = "-"

// Sources finds the logs of names, each a file, a pattern as of path/filepath.Match, or "-" for standard input; none is standard
// input too. A file that is named twice is read once. What is missing or cannot be opened is an error, before anything is read.
func Sources(names []string, stdin io.Reader) ([]Source, error) {
	if len(names) == 0 {
		names = []string{Stdin}
	}
	var found []Source
	var failed []error
	var infos []os.FileInfo
	for _, name := range names {
		if name == Stdin {
			if !slices.ContainsFunc(found, func(s Source) bool { return s.Name == "standard input" }) {
				found = append(found, Source{Name: "standard input", Size: -1, open: func() (io.ReadCloser, error) { return io.NopCloser(stdin), nil }})
			}
			continue
		}
		paths, err := matches(name)
		if err != nil {
			failed = append(failed, err)
			continue
		}
		for _, path := range paths {
			source, info, err := fileSource(path)
			switch {
			case err != nil:
				failed = append(failed, err)
			case !slices.ContainsFunc(infos, func(other os.FileInfo) bool { return os.SameFile(info, other) }):
				infos, found = append(infos, info), append(found, source)
			}
		}
	}
	return found, errors.Join(failed...)
}

// matches are the files of a pattern; a name that is no pattern stands for itself.
func matches(name string) ([]string, error) {
	if _, err := os.Lstat(name); err == nil || !strings.ContainsAny(name, `*?[`) {
		return []string{name}, nil
	}
	paths, err := filepath.Glob(name)
	if err != nil {
		return nil, fmt.Errorf("%s: not a pattern: %w", name, err)
	}
	if len(paths) == 0 {
		return nil, fmt.Errorf("%s: no file is called so", name)
	}
	return paths, nil
}

func fileSource(path string) (Source, os.FileInfo, error) {
	file, err := os.Open(path)
	if err != nil {
		return Source{}, nil, err
	}
	info, err := file.Stat()
	if err == nil && !info.IsDir() && !info.Mode().IsRegular() {
		// A pipe, whose writer would be told that nobody reads any more.
		return Source{Name: path, Size: -1, open: func() (io.ReadCloser, error) { return file, nil }}, info, nil
	}
	err = errors.Join(err, file.Close())
	if err != nil {
		return Source{}, nil, err
	}
	if info.IsDir() {
		return Source{}, nil, fmt.Errorf("%s: a directory; name the files in it, such as %s", path, filepath.Join(path, "*"))
	}
	return Source{Name: path, Size: info.Size(), open: func() (io.ReadCloser, error) { return os.Open(path) }}, info, nil
}

// maxWindow bounds what a zstd stream makes its reader remember, in bytes; `zstd -19` needs 8 MiB.
const maxWindow = 32 << 20

func isGzip(head []byte) bool { return bytes.HasPrefix(head, []byte{0x1f, 0x8b}) }
func isZstd(head []byte) bool { return bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}) }

// otherPackers are those that are known, and not unpacked, by how what they write begins.
var otherPackers = []struct{ name, head string }{{"xz", "\xfd7zX"}, {"bzip2", "BZh"}, {"zip", "PK\x03\x04"}}

// decompress unpacks what is packed with gzip or zstd, known by how it begins, not by its name. What another packer has written is an error.
func decompress(packed io.Reader) (io.Reader, func(), error) {
	buffered := bufio.NewReaderSize(packed, 64<<10)
	head, err := buffered.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, err
	}
	switch {
	case isGzip(head):
		unpacked, err := gzip.NewReader(buffered)
		if err != nil {
			return nil, nil, fmt.Errorf("begins like gzip: %w", err)
		}
		return unpacked, func() {}, nil
	case isZstd(head):
		unpacked, err := zstd.NewReader(buffered, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, nil, fmt.Errorf("begins like zstd: %w", err)
		}
		return unpacked, unpacked.Close, nil
	}
	for _, packer := range otherPackers {
		if bytes.HasPrefix(head, []byte(packer.head)) {
			return nil, nil, fmt.Errorf("is packed with %s: unpack it first, only gzip and zstd are unpacked here", packer.name)
		}
	}
	return buffered, func() {}, nil
}
