package bridge

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ebb/event"
	"ebb/replication"
	"ebb/sql"
)

// Role is what a bridge is for its slot.
type Role string

const (
	// RoleLeader delivers.
	RoleLeader Role = "leader"
	// RoleStandby waits to take over.
	RoleStandby Role = "standby"
	// RoleNone says that nobody delivers.
	RoleNone Role = "none"
)

// Status says how delivery from a slot goes, as far as the database knows.
type Status struct {
	Slot      SlotStatus      `json:"slot"`
	Delivered DeliveredStatus `json:"delivered"`
	// LagSeconds is the age of the oldest event that is not recorded as delivered.
	LagSeconds float64       `json:"lag_seconds"`
	Backlog    BacklogStatus `json:"backlog"`
	Flow       sql.FlowState `json:"flow"`
	// Role is that of the bridge that answers; asked from outside, that of the bridge that leads, if there is one.
	Role   Role          `json:"role"`
	Replay *ReplayStatus `json:"replay"`
	// DeadLetters is how many events are set aside and neither delivered nor discarded since.
	DeadLetters int64           `json:"dead_letters"`
	Recovery    *RecoveryStatus `json:"recovery"`
}

// SlotStatus is what the server says of the slot.
type SlotStatus struct {
	Name   string `json:"name"`
	Active bool   `json:"active"`
	// WALStatus is that of pg_replication_slots, or "missing".
	WALStatus        string    `json:"wal_status"`
	ConfirmedLSN     event.LSN `json:"confirmed_lsn"`
	LagBytes         int64     `json:"lag_bytes"`
	RetainedWALBytes int64     `json:"retained_wal_bytes"`
	// Made is how often ebb has made the slot: more than once means that it was lost, the last time because of MadeBecause.
	Made        int    `json:"-"`
	MadeBecause string `json:"-"`
}

// DeliveredStatus is what was last recorded as delivered; Position and At are null before the first event.
type DeliveredStatus struct {
	Position *event.Position `json:"position"`
	Events   int64           `json:"events"`
	At       *time.Time      `json:"at"`
}

// BacklogStatus is what is not recorded as delivered.
type BacklogStatus struct {
	Events int64 `json:"events"`
	// Estimated says that they were not counted.
	Estimated        bool    `json:"estimated"`
	OldestAgeSeconds float64 `json:"oldest_age_seconds"`
}

// RecoveryStatus says how far the delivery of rows from before the slot has come.
type RecoveryStatus struct {
	Since  time.Time `json:"since"`
	Events int64     `json:"events"`
	// Because is why the slot was made, for the Times-th time.
	Because string `json:"because"`
	Times   int    `json:"times"`
}

// ReplayStatus is a replay that has not ended.
type ReplayStatus struct {
	ID int64 `json:"id"`
	// State is requested, which waits for a bridge, or running.
	State sql.ReplayState `json:"state"`
	From  event.LSN       `json:"from"`
	// Events is how many there are to deliver again, 0 if they were not counted, and Delivered how many were since it began.
	Events      int64     `json:"events"`
	Delivered   int64     `json:"delivered"`
	RequestedAt time.Time `json:"requested_at"`
	RequestedBy string    `json:"requested_by"`
}

// Healthy reports whether somebody delivers and can.
func (s *Status) Healthy() bool {
	return s.Role != RoleNone && s.Slot.WALStatus != "missing" && s.Slot.WALStatus != "lost"
}

// ReadStatus asks the database, in one transaction, so that what it says fits together.
func ReadStatus(ctx context.Context, db *pgxConn, slotName string) (_ *Status, err error) {
	if _, err := db.Exec(ctx, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"); err != nil {
		return nil, fmt.Errorf("read the status: %w", err)
	}
	defer func() {
		if _, rollbackErr := db.Exec(ctx, "ROLLBACK"); err == nil && rollbackErr != nil {
			err = fmt.Errorf("read the status: %w", rollbackErr)
		}
	}()
	if err := sql.Check(ctx, db); err != nil {
		return nil, err
	}
	s := &Status{Slot: SlotStatus{Name: slotName, WALStatus: "missing"}, Role: RoleNone}
	slot, err := replication.InspectSlot(ctx, db, slotName)
	if err != nil && !errors.Is(err, replication.ErrNoSlot) {
		return nil, err
	}
	if err == nil {
		s.Slot = SlotStatus{Name: slotName, Active: slot.Active, WALStatus: slot.WALStatus, ConfirmedLSN: slot.ConfirmedFlush,
			LagBytes: slot.LagBytes(), RetainedWALBytes: slot.RetainedBytes()}
	}
	record, err := sql.ReadSlot(ctx, db, slotName)
	if err != nil && !errors.Is(err, sql.ErrNoRecord) {
		return nil, err
	}
	if err == nil {
		s.Slot.Made, s.Slot.MadeBecause = record.MadeTimes, record.MadeBecause
		if record.Made && !record.Done {
			s.Recovery = &RecoveryStatus{Since: record.CreatedAt.UTC(), Events: record.Recovered, Because: record.MadeBecause,
				Times: record.MadeTimes}
		}
		replay, ok, err := sql.LastReplay(ctx, db, slotName)
		if err != nil {
			return nil, err
		}
		if ok && replay.Active() {
			s.Replay = &ReplayStatus{ID: replay.ID, State: replay.State, From: replay.From, Events: replay.Events, Delivered: replay.Delivered,
				RequestedAt: replay.RequestedAt.UTC(), RequestedBy: replay.RequestedBy}
		}
		tick, ok, err := sql.LastTick(ctx, db, record)
		if err != nil {
			return nil, err
		}
		if ok && tick.Events > 0 {
			at := tick.DeliveredAt.UTC()
			s.Delivered = DeliveredStatus{Position: &tick.Position, Events: tick.Events, At: &at}
		}
	}
	if s.Flow, err = sql.ReadFlow(ctx, db, slotName); err != nil {
		return nil, err
	}
	backlog, err := sql.ReadBacklog(ctx, db)
	if err != nil {
		return nil, err
	}
	s.Backlog = BacklogStatus{Events: backlog.Events, Estimated: backlog.Estimated, OldestAgeSeconds: backlog.OldestAge.Seconds()}
	s.LagSeconds = s.Backlog.OldestAgeSeconds
	parked, retrying, err := sql.CountDead(ctx, db, slotName)
	if err != nil {
		return nil, err
	}
	s.DeadLetters = parked + retrying
	led, err := sql.HasLeader(ctx, db, slotName)
	if err != nil {
		return nil, err
	}
	if led {
		s.Role = RoleLeader
	}
	return s, nil
}
