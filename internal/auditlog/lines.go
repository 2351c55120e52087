package auditlog

import (
	"bufio"
	"errors"
	"io"
)

const (
	// maxLine bounds a line, in bytes. An event has at most two objects, of at most 1.5 MiB each as etcd keeps them, except
	// that of a collection delete, which lists every pod.
	maxLine = 16 << 20
	// readSize is how much is read at once.
	readSize = 256 << 10
	// headSize is how much of a line that is too long is kept, to say what it was about.
	headSize = 4 << 10
)

// lines takes a log apart. Its memory is bounded, whatever is in the log.
type lines struct {
	from *bufio.Reader
	long []byte
}

func newLines(from io.Reader) *lines { return &lines{from: bufio.NewReaderSize(from, readSize)} }

// next returns a line without its end, valid until the next call. ended says that it has one: the last line of a log that is still
// written may have none. Of a line that is too long only the head is returned.
func (l *lines) next() (text []byte, ended, tooLong bool, err error) {
	text, err = l.from.ReadSlice('\n')
	if !errors.Is(err, bufio.ErrBufferFull) {
		return l.cut(text, err)
	}
	if cap(l.long) > 4*readSize {
		l.long = nil
	}
	l.long = append(l.long[:0], text...)
	for errors.Is(err, bufio.ErrBufferFull) {
		text, err = l.from.ReadSlice('\n')
		if len(l.long)+len(text) > maxLine {
			tooLong = true
			l.long = append([]byte(nil), l.long[:headSize]...)
		}
		if !tooLong {
			l.long = append(l.long, text...)
		}
	}
	if tooLong {
		return l.long, true, true, ignoreEOF(err)
	}
	text, ended, _, err = l.cut(l.long, err)
	return text, ended, false, err
}

// cut takes the end from a line. The end of the file is an error only where there is no line before it.
func (l *lines) cut(text []byte, err error) ([]byte, bool, bool, error) {
	if err == nil {
		text = text[:len(text)-1]
		if n := len(text); n > 0 && text[n-1] == '\r' {
			text = text[:n-1]
		}
		return text, true, false, nil
	}
	if len(text) > 0 {
		err = ignoreEOF(err)
	}
	return text, false, false, err
}

func ignoreEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}
