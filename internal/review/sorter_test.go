package review

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
)

// Whatever fits into memory, records come back in order, all of them, as often as they are asked for, and nothing stays on the disk.
func TestRecordsComeBackInOrder(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir())
	random := rand.New(rand.NewPCG(1, 2))
	for _, limit := range []int{0, 100, 10_000, 1 << 20} {
		s := newSorter(limit)
		want := map[string]int{}
		for i := range 5000 {
			key := binary.BigEndian.AppendUint32(nil, random.Uint32N(2000))
			value := bytes.Repeat([]byte{byte(i)}, random.IntN(20))
			want[fmt.Sprintf("%x %x", key, value)]++
			if err := s.add(key, value); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			got := map[string]int{}
			var last record
			for r, err := range s.all() {
				if err != nil || r.compare(last) < 0 {
					t.Fatalf("limit %d: %x after %x, %v", limit, r, last, err)
				}
				last = record{bytes.Clone(r.key), bytes.Clone(r.value)}
				got[fmt.Sprintf("%x %x", r.key, r.value)]++
			}
			if fmt.Sprint(got) != fmt.Sprint(want) {
				t.Fatalf("limit %d: %d different records of %d", limit, len(got), len(want))
			}
		}
		open := 0
		for _, files := range s.files {
			open += len(files)
		}
		if spilled := open > 0; spilled != (limit < 1<<20) || open > 3*mergeAt {
			t.Errorf("limit %d: %d files", limit, open)
		}
		left, err := os.ReadDir(os.Getenv("TMPDIR"))
		if err := s.Close(); err != nil || len(left) > 0 {
			t.Errorf("limit %d: %v stay, %v", limit, left, err)
		}
		if err != nil {
			t.Error(err)
		}
	}
}

// A full disk must not look like a short log.
func TestADiskThatCannotBeWrittenTo(t *testing.T) {
	t.Setenv("TMPDIR", t.TempDir()+"/missing")
	s := newSorter(10)
	first, second := s.add([]byte("key"), make([]byte, 20)), s.add([]byte("key"), nil)
	if first != nil || second == nil {
		t.Errorf("%v, %v", first, second)
	}
}
