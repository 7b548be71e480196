package webhook

import (
	"container/heap"
	"slices"
)

// ordered is a heap.
type ordered[T comparable] struct {
	items  []T
	before func(a, b T) bool
}

func (o *ordered[T]) len() int { return len(o.items) }
func (o *ordered[T]) first() T { return o.items[0] }
func (o *ordered[T]) push(x T) { heap.Push((*heapOf[T])(o), x) }
func (o *ordered[T]) pop() T   { return heap.Pop((*heapOf[T])(o)).(T) }

// remove removes x, and reports whether it was there.
func (o *ordered[T]) remove(x T) bool {
	i := slices.Index(o.items, x)
	if i >= 0 {
		heap.Remove((*heapOf[T])(o), i)
	}
	return i >= 0
}

// heapOf keeps the methods that container/heap asks for from those of ordered.
type heapOf[T comparable] ordered[T]

func (h *heapOf[T]) Len() int           { return len(h.items) }
func (h *heapOf[T]) Less(i, j int) bool { return h.before(h.items[i], h.items[j]) }
func (h *heapOf[T]) Swap(i, j int)      { h.items[i], h.items[j] = h.items[j], h.items[i] }
func (h *heapOf[T]) Push(x any)         { h.items = append(h.items, x.(T)) }
func (h *heapOf[T]) Pop() any {
	last := len(h.items) - 1
	x := h.items[last]
	var none T
	h.items[last] = none
	h.items = h.items[:last]
	return x
}
