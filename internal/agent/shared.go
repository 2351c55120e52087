package agent

import (
	"context"
	"sync"
	"time"
)

// shared does one thing for all who want it at the same time. Whoever asks gets the result of a run that began after the
// question, because what an earlier one has seen may have changed. At most one runs at a time, but for those that hang.
type shared[T any] struct {
	runs runs

	mu sync.Mutex
	// next is the run that has not begun, and current the one that has not ended, unless it was given up on.
	next    *result[T]
	current *probeRun
}

type result[T any] struct {
	done  chan struct{}
	value T
}

// do returns what work returns, or an error when ctx ends before, or too many runs hang.
func (s *shared[T]) do(ctx context.Context, work func(context.Context) T) (T, error) {
	var none T
	if ctx.Err() != nil {
		return none, errNoTime
	}
	start := time.Now()
	s.mu.Lock()
	r := s.next
	if r == nil {
		r = &result[T]{done: make(chan struct{})}
		s.next = r
	}
	if s.current == nil || s.current.hangs() {
		begun, err := s.runs.begin()
		if err != nil {
			s.mu.Unlock()
			return none, err
		}
		s.current = begun
		go s.run(begun, work)
	}
	current := s.current
	s.mu.Unlock()
	select {
	case <-r.done:
		return r.value, nil
	case <-ctx.Done():
		return none, current.noAnswer(start)
	}
}

// run works until nobody waits, or until it was given up on because it took too long.
func (s *shared[T]) run(this *probeRun, work func(context.Context) T) {
	defer s.runs.end(this)
	for {
		s.mu.Lock()
		if s.current != this {
			s.mu.Unlock()
			return
		}
		r := s.next
		s.next = nil
		if r == nil {
			s.current = nil
			s.mu.Unlock()
			return
		}
		this.restart()
		s.mu.Unlock()
		r.value = work(this.with(context.Background()))
		close(r.done)
	}
}
