package review

import (
	"bufio"
	"bytes"
	"cmp"
	"container/heap"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"os"
	"slices"
)

// A log can tell more than memory holds. Of records, only so many bytes stay there; the rest is in temporary files (TMPDIR).
const (
	// mergeAt is how many files of one level are merged into one of the next, so that few are open at a time.
	mergeAt = 16
	// fileBuffer is how much of each file is in memory, in bytes.
	fileBuffer = 16 << 10
)

// sorter gives back records in the order of their keys, and of their values where keys are the same, as often as it is asked.
type sorter struct {
	// limit is how many bytes of records stay in memory.
	limit   int
	records []byte
	places  []place
	// files are sorted each, by their level: how often what is in them was merged.
	files [][]*os.File
}

// place is where a record is in the records: a key, followed by its value.
type place struct{ key, value, end uint32 }

// newSorter returns one that keeps so many bytes in memory. It is to be closed.
func newSorter(limit int) *sorter { return &sorter{limit: limit} }

// Close gives back memory and files.
func (s *sorter) Close() error {
	var failed []error
	for _, file := range slices.Concat(s.files...) {
		failed = append(failed, file.Close())
	}
	*s = sorter{limit: s.limit}
	return errors.Join(failed...)
}

// add takes copies of key and value. An error is one of writing the temporary file.
func (s *sorter) add(key, value []byte) error {
	if len(key)+len(value) > math.MaxInt32 {
		return fmt.Errorf("a record of %d bytes", len(value))
	}
	if len(s.places) > 0 && len(s.records)+len(key)+len(value) > s.limit {
		if err := s.spill(); err != nil {
			return err
		}
	}
	at := len(s.records)
	s.records = append(append(s.records, key...), value...)
	s.places = append(s.places, place{uint32(at), uint32(at + len(key)), uint32(len(s.records))}) //nolint:gosec // below the limit and one record
	return nil
}

// spill moves what is in memory to a file.
func (s *sorter) spill() error {
	if err := s.write(0, []source{s.inMemory()}); err != nil {
		return err
	}
	s.records, s.places = s.records[:0], s.places[:0]
	for level := 0; level < len(s.files) && len(s.files[level]) >= mergeAt; level++ {
		merged := s.files[level]
		var from []source
		for _, file := range merged {
			from = append(from, inFile(file))
		}
		if err := s.write(level+1, from); err != nil {
			return err
		}
		s.files[level] = nil
		for _, file := range merged {
			if err := file.Close(); err != nil {
				return err
			}
		}
	}
	return nil
}

// write merges sources into one file of a level. The file has no name any more, so that nothing is left behind however the review ends.
func (s *sorter) write(level int, from []source) error {
	file, err := os.CreateTemp("", "eni-guard-audit-")
	if err != nil {
		return err
	}
	if err := os.Remove(file.Name()); err != nil {
		return errors.Join(err, file.Close())
	}
	for len(s.files) <= level {
		s.files = append(s.files, nil)
	}
	s.files[level] = append(s.files[level], file)
	out := bufio.NewWriterSize(file, fileBuffer)
	var head []byte
	for record, err := range merge(from) {
		if err != nil {
			return err
		}
		head = binary.AppendUvarint(binary.AppendUvarint(head[:0], uint64(len(record.key))), uint64(len(record.value)))
		for _, part := range [][]byte{head, record.key, record.value} {
			// It keeps the first error until it is flushed.
			_, _ = out.Write(part)
		}
	}
	return out.Flush()
}

// all goes through the records in order. One is valid until the next is asked for.
func (s *sorter) all() iter.Seq2[record, error] {
	from := []source{s.inMemory()}
	for _, file := range slices.Concat(s.files...) {
		from = append(from, inFile(file))
	}
	return merge(from)
}

type record struct{ key, value []byte }

func (r record) compare(other record) int {
	return cmp.Or(bytes.Compare(r.key, other.key), bytes.Compare(r.value, other.value))
}

// source gives sorted records one after the other, and then io.EOF.
type source func() (record, error)

func (s *sorter) record(p place) record {
	return record{s.records[p.key:p.value], s.records[p.value:p.end]}
}

func (s *sorter) inMemory() source {
	slices.SortFunc(s.places, func(a, b place) int { return s.record(a).compare(s.record(b)) })
	next := 0
	return func() (record, error) {
		if next == len(s.places) {
			return record{}, io.EOF
		}
		next++
		return s.record(s.places[next-1]), nil
	}
}

func inFile(file *os.File) source {
	in := bufio.NewReaderSize(io.NewSectionReader(file, 0, math.MaxInt64), fileBuffer)
	var buffer []byte
	return func() (record, error) {
		key, err := binary.ReadUvarint(in)
		if err != nil {
			return record{}, err // io.EOF at the end
		}
		value, err := binary.ReadUvarint(in)
		if err != nil {
			return record{}, io.ErrUnexpectedEOF
		}
		buffer = slices.Grow(buffer[:0], int(key+value))[:key+value] //nolint:gosec // as it was written
		if _, err := io.ReadFull(in, buffer); err != nil {
			return record{}, io.ErrUnexpectedEOF
		}
		return record{buffer[:key], buffer[key:]}, nil
	}
}

// heads are the next records of sources, as a heap.
type heads []head

type head struct {
	record

	from source
}

func (h heads) Len() int           { return len(h) }
func (h heads) Less(a, b int) bool { return h[a].compare(h[b].record) < 0 }
func (h heads) Swap(a, b int)      { h[a], h[b] = h[b], h[a] }
func (h *heads) Push(x any)        { *h = append(*h, x.(head)) }
func (h *heads) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}

func merge(from []source) iter.Seq2[record, error] {
	return func(yield func(record, error) bool) {
		var next heads
		for _, s := range from {
			switch r, err := s(); {
			case err == nil:
				next = append(next, head{r, s})
			case !errors.Is(err, io.EOF):
				yield(record{}, err)
				return
			}
		}
		for heap.Init(&next); len(next) > 0; {
			if !yield(next[0].record, nil) {
				return
			}
			switch r, err := next[0].from(); {
			case err == nil:
				next[0].record = r
				heap.Fix(&next, 0)
			case errors.Is(err, io.EOF):
				heap.Pop(&next)
			default:
				yield(record{}, err)
				return
			}
		}
	}
}
