package agent

import (
	"context"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
)

// Whoever asks while something runs shares the next run with all others who do; what has begun before is not for them.
func TestQuestionsAtTheSameTimeShareALook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s shared[int]
		var mu sync.Mutex
		var answers []int
		runs, goOn := 0, make(chan struct{})
		ask := func() {
			n, err := s.do(t.Context(), func(context.Context) int {
				runs++
				n := runs
				<-goOn
				return n
			})
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			answers = append(answers, n)
		}
		go ask()
		synctest.Wait()
		for range 5 {
			go ask()
			synctest.Wait()
		}
		impatient, leave := context.WithCancel(t.Context())
		leave()
		if _, err := s.do(impatient, func(context.Context) int { return 0 }); err == nil {
			t.Error("an answer after the end of the question")
		}
		for range 2 {
			goOn <- struct{}{}
			synctest.Wait()
		}
		if want := []int{1, 2, 2, 2, 2, 2}; !slices.Equal(answers, want) {
			t.Errorf("answers of the runs %v, want %v", answers, want)
		}
		go ask()
		synctest.Wait()
		goOn <- struct{}{}
		synctest.Wait()
		if runs != 3 || answers[len(answers)-1] != 3 {
			t.Errorf("later: %d runs, answers %v", runs, answers)
		}
	})
}
