package agent

import (
	"context"
	"sync"
	"time"
)

// shared does one thing for all who want it at the same time. Whoever asks gets the result of a run that began after the
// question, because what an earlier one has seen may have changed. At most one runs at a time, also when it hangs.
type shared[T any] struct {
	mu sync.Mutex
	// next is the run that has not begun, and running says whether another one has not ended.
	next    *result[T]
	running bool
}

type result[T any] struct {
	done  chan struct{}
	value T
}

// do returns what work returns, or an error when ctx ends before.
func (s *shared[T]) do(ctx context.Context, work func() T) (T, error) {
	start := time.Now()
	s.mu.Lock()
	r := s.next
	if r == nil {
		r = &result[T]{done: make(chan struct{})}
		s.next = r
		if !s.running {
			s.running = true
			go s.run(work)
		}
	}
	s.mu.Unlock()
	select {
	case <-r.done:
		return r.value, nil
	case <-ctx.Done():
		var none T
		return none, noAnswerAfter(start)
	}
}

// run works until nobody waits.
func (s *shared[T]) run(work func() T) {
	for {
		s.mu.Lock()
		r := s.next
		s.next = nil
		s.running = r != nil
		s.mu.Unlock()
		if r == nil {
			return
		}
		r.value = work()
		close(r.done)
	}
}
